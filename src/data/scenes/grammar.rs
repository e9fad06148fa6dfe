//! Captions: their structure, their text, and how to draw one at random.

use std::fmt;

use rand::Rng;
use rand::seq::IndexedRandom;

use super::vocabulary::{COUNTS, Category, Colour, Relation, Shape, Texture};
use crate::{Error, Result};

/// One noun phrase: "a striped red circle", "three green stars".
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectSpec {
    pub shape: Shape,
    pub colour: Option<Colour>,
    pub texture: Option<Texture>,
    /// `None` for "a …", which promises one object and nothing about others.
    pub count: Option<u32>,
}

/// A caption of the scene world. With a relation there are exactly two objects.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Caption {
    pub objects: Vec<ObjectSpec>,
    pub relation: Option<Relation>,
}

impl ObjectSpec {
    pub fn new(shape: Shape) -> Self {
        Self { shape, colour: None, texture: None, count: None }
    }

    /// How many objects this phrase asks for.
    pub fn instances(&self) -> u32 {
        self.count.unwrap_or(1)
    }
}

impl fmt::Display for ObjectSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::with_capacity(4);
        words.extend(self.texture.map(Texture::word));
        words.extend(self.colour.map(Colour::word));
        words.push(self.shape.word());
        let noun = words.join(" ");
        match self.count {
            None => {
                let article = if noun.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
                write!(f, "{article} {noun}")
            }
            Some(n) => {
                let plural = if n == 1 { "" } else { "s" };
                let word = COUNTS.get(n.wrapping_sub(1) as usize).copied().unwrap_or("many");
                write!(f, "{word} {noun}{plural}")
            }
        }
    }
}

impl fmt::Display for Caption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let link = self.relation.map_or("and", Relation::word);
        for (i, object) in self.objects.iter().enumerate() {
            if i > 0 {
                write!(f, " {link} ")?;
            }
            write!(f, "{object}")?;
        }
        Ok(())
    }
}

impl Caption {
    /// Reads a caption back from its text (case and extra spaces are ignored).
    ///
    /// # Errors
    /// Names the first word that the grammar does not know.
    pub fn parse(text: &str) -> Result<Self> {
        let lower = text.to_lowercase();
        let words: Vec<&str> =
            lower.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).collect();
        let mut parser = Parser { words: &words, at: 0 };
        let mut objects = vec![parser.object()?];
        let mut relation = None;
        while parser.at < words.len() {
            match parser.link()? {
                Some(r) if objects.len() == 1 => relation = Some(r),
                Some(_) => return Err(parser.error("a relation only between two objects")),
                None if relation.is_some() => {
                    return Err(parser.error("nothing after the second object of a relation"));
                }
                None => {}
            }
            objects.push(parser.object()?);
        }
        Ok(Self { objects, relation })
    }

    /// The category that a caption of this form belongs to.
    pub fn category(&self) -> Category {
        let any_texture = self.objects.iter().any(|o| o.texture.is_some());
        let any_colour = self.objects.iter().any(|o| o.colour.is_some());
        if self.objects.iter().any(|o| o.count.is_some()) {
            Category::Numeracy
        } else if self.relation.is_some() {
            if any_texture { Category::Complex } else { Category::Spatial }
        } else if any_texture && any_colour && self.objects.len() > 1 {
            Category::Complex
        } else if any_texture {
            Category::Texture
        } else if any_colour {
            Category::Color
        } else {
            Category::Shape
        }
    }

    /// The same for captions that say the same: the order of "and" and the
    /// direction of a relation do not matter.
    pub fn combination(&self) -> String {
        let mut objects = self.objects.clone();
        let relation = match self.relation {
            Some(r @ (Relation::RightOf | Relation::Below)) => {
                objects.reverse();
                Some(r.inverse())
            }
            None => {
                objects.sort();
                None
            }
            keep => keep,
        };
        Caption { objects, relation }.to_string()
    }

    /// Draws a caption of `category`.
    pub fn sample(category: Category, rng: &mut impl Rng) -> Self {
        let (objects, relation) = match category {
            Category::Color => (objects(rng, &[0.25, 0.75], true, 0.0), None),
            Category::Shape => (objects(rng, &[0.15, 0.5, 0.35], false, 0.0), None),
            Category::Texture => {
                // A single object names its colour too; a pair binds textures only.
                let single = rng.random_bool(0.35);
                let weights: &[f64] = if single { &[1.0] } else { &[0.0, 1.0] };
                (objects(rng, weights, single, 1.0), None)
            }
            Category::Spatial => (distinct_pair(rng, 0.0), Some(pick(rng, Relation::ALL))),
            Category::Numeracy => (counted(rng), None),
            Category::Complex => {
                if rng.random_bool(0.65) {
                    let mut pair = distinct_pair(rng, 0.6);
                    if pair.iter().all(|o| o.texture.is_none()) {
                        pair[0].texture = Some(pick(rng, &[Texture::Striped, Texture::Dotted]));
                    }
                    (pair, Some(pick(rng, Relation::ALL)))
                } else {
                    let mut three = objects(rng, &[0.0, 0.0, 1.0], true, 0.4);
                    if three.iter().all(|o| o.texture.is_none()) {
                        three[1].texture = Some(pick(rng, &[Texture::Striped, Texture::Dotted]));
                    }
                    (three, None)
                }
            }
        };
        Self { objects, relation }
    }
}

fn pick<T: Copy>(rng: &mut impl Rng, of: &[T]) -> T {
    of[rng.random_range(0..of.len())]
}

fn object(rng: &mut impl Rng, colour: bool, texture: f64) -> ObjectSpec {
    ObjectSpec {
        shape: pick(rng, Shape::ALL),
        colour: colour.then(|| pick(rng, Colour::ALL)),
        texture: (texture > 0.0 && rng.random_bool(texture)).then(|| pick(rng, Texture::ALL)),
        count: None,
    }
}

/// `weights[i]` is the chance of `i + 1` objects.
fn objects(rng: &mut impl Rng, weights: &[f64], colour: bool, texture: f64) -> Vec<ObjectSpec> {
    let sizes: Vec<usize> = (1..=weights.len()).collect();
    let n = sizes.choose_weighted(rng, |&n| weights[n - 1]).copied().unwrap_or(1);
    (0..n).map(|_| object(rng, colour, texture)).collect()
}

/// Two objects that differ in shape or colour, so that a relation between them means something.
fn distinct_pair(rng: &mut impl Rng, texture: f64) -> Vec<ObjectSpec> {
    loop {
        let (a, b) = (object(rng, true, texture), object(rng, true, texture));
        if (a.shape, a.colour) != (b.shape, b.colour) {
            return vec![a, b];
        }
    }
}

fn counted(rng: &mut impl Rng) -> Vec<ObjectSpec> {
    let mut a = object(rng, true, 0.0);
    if rng.random_bool(0.6) {
        a.count = Some(rng.random_range(1..=4));
        return vec![a];
    }
    loop {
        let mut b = object(rng, true, 0.0);
        if (a.shape, a.colour) == (b.shape, b.colour) {
            continue;
        }
        let (n, m) = pick(rng, &[(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2)]);
        (a.count, b.count) = (Some(n), Some(m));
        return vec![a, b];
    }
}

struct Parser<'a> {
    words: &'a [&'a str],
    at: usize,
}

impl Parser<'_> {
    fn peek(&self) -> &str {
        self.words.get(self.at).copied().unwrap_or("")
    }

    fn error(&self, expected: &str) -> Error {
        let got =
            if self.peek().is_empty() { "the end".into() } else { format!("'{}'", self.peek()) };
        Error::invalid(
            "prompt",
            format!(
                "not a caption of the scene world: expected {expected}, got {got} at word {}",
                self.at + 1
            ),
        )
    }

    fn object(&mut self) -> Result<ObjectSpec> {
        let count = COUNTS.iter().position(|w| *w == self.peek()).map(|i| i as u32 + 1);
        if count.is_none() && !matches!(self.peek(), "a" | "an" | "the") {
            return Err(self.error("an article or a number from one to four"));
        }
        self.at += 1;
        let texture = Texture::from_word(self.peek());
        self.at += usize::from(texture.is_some());
        let colour = Colour::from_word(self.peek());
        self.at += usize::from(colour.is_some());
        let word = self.peek();
        let singular = word.strip_suffix('s').filter(|_| count.is_some()).unwrap_or(word);
        let shape = Shape::from_word(singular).or_else(|| Shape::from_word(word));
        let Some(shape) = shape else { return Err(self.error("a texture, a colour or a shape")) };
        self.at += 1;
        Ok(ObjectSpec { shape, colour, texture, count })
    }

    fn link(&mut self) -> Result<Option<Relation>> {
        let two = self.words[self.at..].iter().take(2).copied().collect::<Vec<_>>().join(" ");
        let (relation, length) = match self.peek() {
            "and" => (None, 1),
            word => match Relation::from_word(word) {
                Some(r) => (Some(r), 1),
                None => match Relation::from_word(&two) {
                    Some(r) => (Some(r), 2),
                    None => return Err(self.error("'and' or a relation")),
                },
            },
        };
        self.at += length;
        Ok(relation)
    }
}
