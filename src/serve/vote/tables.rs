//! Tables that were made already: a thousand replicates are not fitted anew for every reader.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

/// Tables that are kept; callers choose what they are of.
const MOST: usize = 32;

/// The newest tables by contract.
#[derive(Default)]
pub struct Tables(Mutex<BTreeMap<Option<String>, Made>>);

/// A table of so many votes.
struct Made {
    votes: u32,
    table: Arc<Value>,
}

impl Tables {
    /// The table of a contract when there are so many votes, which `make` makes where it is not
    /// kept. One is made at a time; others wait for it.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get<E>(
        &self,
        contract: Option<&str>,
        votes: u32,
        make: impl FnOnce() -> Result<Value, E>,
    ) -> Result<Arc<Value>, E> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = contract.map(str::to_owned);
        if let Some(made) = kept.get(&key).filter(|made| made.votes == votes) {
            return Ok(Arc::clone(&made.table));
        }
        let table = Arc::new(make()?);
        if kept.len() >= MOST {
            kept.clear();
        }
        kept.insert(key, Made { votes, table: Arc::clone(&table) });
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_is_made_once_for_its_votes() {
        let tables = Tables::default();
        let get = |contract: Option<&str>, votes, table: &str| {
            tables.get(contract, votes, || Ok::<_, ()>(json!(table))).unwrap()
        };
        assert_eq!(*get(None, 1, "a"), "a");
        assert_eq!(*get(None, 1, "b"), "a", "kept");
        assert_eq!(*get(Some("equal_f:1"), 1, "c"), "c", "another contract");
        assert_eq!(*get(None, 2, "d"), "d", "another vote");
        assert_eq!(tables.get(None, 3, || Err(())), Err(()));
        assert_eq!(*get(None, 3, "e"), "e", "what failed is not kept");
        for number in 0..100 {
            get(Some(&number.to_string()), 3, "f");
        }
        assert!(tables.0.lock().unwrap().len() <= MOST);
    }
}
