//! CLIP's own vocabulary (arXiv 2103.00020), from a crate that carries it, behind the steps that
//! transformers puts before the merges.

use std::fmt;
use std::sync::{Arc, OnceLock};

use instant_clip_tokenizer::Tokenizer;
use tokenizers::normalizers::Sequence;
use tokenizers::{NormalizedString, Normalizer};

use super::tokenizer::normalizer;
use crate::{Error, Result};

/// Literals that the crate, but not transformers, takes for the start and end tokens.
const NOT_SPECIAL: [&str; 2] = ["<start_of_text>", "<end_of_text>"];
/// Ids of single bytes and of bytes at a word's end come first.
const BYTES: u32 = 512;

/// Text → token ids, without start, end and padding.
#[derive(Clone)]
pub struct OpenAiWords {
    merges: Arc<Tokenizer>,
    normalizer: Sequence,
    /// Tokens that are whole wherever they stand, with their ids.
    special: [(String, u32); 3],
}

impl fmt::Debug for OpenAiWords {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("OpenAiWords").field("special", &self.special).finish_non_exhaustive()
    }
}

impl OpenAiWords {
    /// `special`: the start, end and padding tokens.
    ///
    /// # Errors
    /// When the padding is no token of the vocabulary.
    pub fn new([start, end, pad]: [&str; 3]) -> Result<Self> {
        // Building the merges takes a while; both towers use the same.
        static MERGES: OnceLock<Arc<Tokenizer>> = OnceLock::new();
        let merges = MERGES.get_or_init(|| Arc::new(Tokenizer::new())).clone();
        let ids = [merges.start_of_text().to_u16(), merges.end_of_text().to_u16()].map(u32::from);
        let padding = match pad {
            _ if pad == end => ids[1],
            _ if pad == start => ids[0],
            // As a word of its own it would have the id 256 further on.
            _ => match encoded(&merges, pad)[..] {
                [id] if (BYTES / 2..BYTES).contains(&id) => id - BYTES / 2,
                _ => {
                    return Err(Error::invalid(
                        "pad_token",
                        format!("'{pad}' is no token of CLIP's"),
                    ));
                }
            },
        };
        let normalizer = normalizer().map_err(|e| Error::invalid("tokenizer", e.to_string()))?;
        let special = [(start, ids[0]), (end, ids[1]), (pad, padding)];
        let special = special.map(|(token, id)| (token.to_owned(), id));
        Ok(Self { merges, normalizer, special })
    }

    /// The ids of the start, end and padding tokens.
    pub fn special(&self) -> [u32; 3] {
        [0, 1, 2].map(|i| self.special[i].1)
    }

    /// # Errors
    /// The normaliser's.
    pub fn ids(&self, text: &str) -> tokenizers::Result<Vec<u32>> {
        let mut normal = NormalizedString::from(text);
        self.normalizer.normalize(&mut normal)?;
        let (mut ids, mut rest) = (Vec::new(), normal.get());
        loop {
            // The first special token; of two at one place, the longer.
            let places = self.special.iter().filter_map(|s| Some((rest.find(s.0.as_str())?, s)));
            let first = places.min_by_key(|(at, s)| (*at, usize::MAX - s.0.len()));
            let Some((at, (token, id))) = first else { break };
            self.words(&rest[..at], &mut ids);
            ids.push(*id);
            rest = &rest[at + token.len()..];
        }
        self.words(rest, &mut ids);
        Ok(ids)
    }

    fn words(&self, text: &str, ids: &mut Vec<u32>) {
        let mut rest = text;
        // A cut after '<' lies between two words, so that it changes nothing but the literal.
        while let Some(at) = NOT_SPECIAL.iter().filter_map(|l| rest.find(l)).min() {
            let (before, after) = rest.split_at(at + 1);
            ids.extend(encoded(&self.merges, before));
            rest = after;
        }
        ids.extend(encoded(&self.merges, rest));
    }
}

fn encoded(merges: &Tokenizer, text: &str) -> Vec<u32> {
    let mut tokens = Vec::new();
    merges.encode(text, &mut tokens);
    tokens.into_iter().map(|token| token.to_u16().into()).collect()
}
