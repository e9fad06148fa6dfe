//! Finds fields that a body has twice. What is decoded into a map of any names takes the last of
//! them in silence.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// The path of the first field that is given twice; `None` also for what is no JSON.
pub fn repeated(bytes: &[u8]) -> Option<String> {
    let mut found = None;
    let walk = Walk { path: String::new(), found: &mut found };
    let mut json = serde_json::Deserializer::from_slice(bytes);
    // An error that is not about a field is found again by whoever decodes the body.
    let _ = walk.deserialize(&mut json);
    found
}

/// Visits a value at a path.
struct Walk<'a> {
    path: String,
    found: &'a mut Option<String>,
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        for index in 0.. {
            let path = format!("{}[{index}]", self.path);
            let inner = Walk { path, found: &mut *self.found };
            if seq.next_element_seed(inner)?.is_none() {
                break;
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            let path = match self.path.as_str() {
                "" => name.clone(),
                path => format!("{path}.{name}"),
            };
            if !seen.insert(name) {
                *self.found = Some(path);
                return Err(A::Error::custom("a field is given twice"));
            }
            map.next_value_seed(Walk { path, found: &mut *self.found })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_twice_is_found_at_any_depth() {
        let of = |text: &str| repeated(text.as_bytes());
        for fine in
            ["", "{", "3", "[1, -2, 0.5, null, true, \"a\"]", r#"{"a":{"a":1},"b":[{"a":1}]}"#]
        {
            assert_eq!(of(fine), None, "{fine}");
        }
        assert_eq!(of(r#"{"a":1,"b":2,"a":3}"#).as_deref(), Some("a"));
        assert_eq!(of(r#"{"a":1,"\u0061":3}"#).as_deref(), Some("a"));
        assert_eq!(of(r#"{"arms":[{},{"x":{"y":1,"y":2}}]}"#).as_deref(), Some("arms[1].x.y"));
    }
}
