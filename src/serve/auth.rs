//! API keys: who may do what. A file lists keys by their hashes; without one,
//! everybody who can connect may do everything.

use std::path::Path;

use actix_web::HttpRequest;
use actix_web::http::{Method, header};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::problem::{Kind, Problem};
use crate::{Error, Result};

/// What a key is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// To generate, and to see what the server has and what the key's holder made.
    Generate,
    /// To vote on images of all.
    Vote,
    /// To see and stop what others made, and to load and unload models.
    Admin,
}

/// The file of keys.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    #[serde(default)]
    key: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    id: String,
    sha256: Vec<String>,
    scopes: Vec<Scope>,
}

#[derive(Debug)]
struct Key {
    id: String,
    /// Of one key, or of two while the second replaces the first.
    hashes: Vec<[u8; 32]>,
    scopes: Vec<Scope>,
}

/// The keys of a server.
#[derive(Debug)]
pub struct Keys(Vec<Key>);

/// Who sent a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The id of its key; without keys the address that it comes from.
    pub name: String,
    /// It may see and stop what others made.
    pub admin: bool,
    /// It may be shown what others made, not knowing whose it is.
    pub votes_on_all: bool,
}

impl Caller {
    /// Somebody of whom nothing is known.
    #[must_use]
    pub fn nobody() -> Self {
        Self { name: "unknown".to_owned(), admin: false, votes_on_all: false }
    }

    /// Whose generations it sees: its own, or all.
    #[must_use]
    pub fn sees(&self, client: &str) -> bool {
        self.admin || self.name == client
    }

    /// The client that lists are limited to.
    #[must_use]
    pub fn only(&self) -> Option<String> {
        (!self.admin).then(|| self.name.clone())
    }
}

/// What a route asks of a caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Nothing,
    Key,
    /// A key with one of these.
    Scope(&'static [Scope]),
}

/// Probes and the page's own files are for everybody; to change something takes a scope; to look,
/// any key.
fn need(method: &Method, pattern: Option<&str>, is_asset: impl Fn(&str) -> bool) -> Need {
    let reads = method == Method::GET || method == Method::HEAD;
    match pattern {
        Some("/livez" | "/readyz" | "/startupz" | "/openapi.json") => Need::Nothing,
        Some(path) if is_asset(path) => Need::Nothing,
        _ if reads => Need::Key,
        Some("/ballots" | "/votes") => Need::Scope(&[Scope::Vote, Scope::Generate, Scope::Admin]),
        Some(path) if path.starts_with("/models/") => Need::Scope(&[Scope::Admin]),
        _ if method == Method::DELETE => Need::Scope(&[Scope::Generate, Scope::Admin]),
        _ => Need::Scope(&[Scope::Generate]),
    }
}

impl Keys {
    /// Reads a file of keys.
    ///
    /// # Errors
    /// The file is unusable; the message names the key.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        Self::parse(&text).map_err(|message| Error::file(path, message))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let file: KeyFile = toml::from_str(text).map_err(|e| e.to_string().trim().to_owned())?;
        if file.key.is_empty() {
            return Err("has no [[key]]".to_owned());
        }
        let mut keys: Vec<Key> = Vec::new();
        for Entry { id, sha256, scopes } in file.key {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if id.is_empty() || !id.chars().all(plain) {
                return Err(format!("id '{id}' must be letters, digits, '-', '_' and '.'"));
            }
            if keys.iter().any(|key| key.id == id) {
                return Err(format!("there are two keys with id {id}"));
            }
            if !(1..=2).contains(&sha256.len()) {
                let n = sha256.len();
                return Err(format!("key {id} has {n} hashes; one, or two to change it"));
            }
            if scopes.is_empty() {
                return Err(format!("key {id} has no scopes"));
            }
            let hash = |hex: &String| {
                unhex(hex).ok_or_else(|| {
                    format!("key {id}: '{hex}' is not a SHA-256 of 64 hexadecimal digits")
                })
            };
            let hashes = sha256.iter().map(hash).collect::<Result<_, _>>()?;
            keys.push(Key { id, hashes, scopes });
        }
        Ok(Self(keys))
    }

    /// Takes the same time whichever key it is, and whether it is one.
    fn find(&self, secret: &[u8]) -> Option<&Key> {
        let digest: [u8; 32] = Sha256::digest(secret).into();
        let mut found = None;
        for key in &self.0 {
            for hash in &key.hashes {
                if bool::from(hash.ct_eq(&digest)) {
                    found = Some(key);
                }
            }
        }
        found
    }
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
    let bytes: Vec<u8> =
        digits?.chunks(2).map(|pair| pair.iter().fold(0, |n, d| n * 16 + d)).collect();
    (text.len() == 64).then(|| bytes.try_into().ok()).flatten()
}

/// A new key and the hash of it that goes into the file.
///
/// # Errors
/// The system gives no random numbers.
pub fn make_key() -> Result<(String, String)> {
    let mut random = [0; 32];
    getrandom::fill(&mut random).map_err(|e| Error::invalid("random numbers", e.to_string()))?;
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let key = format!("ds_{}", hex(&random));
    let hash = hex(&Sha256::digest(key.as_bytes()));
    Ok((key, hash))
}

/// Lets a request through and says whose it is.
///
/// # Errors
/// 401 without a valid key, 403 with one that is not good for this.
pub fn check(
    keys: Option<&Keys>,
    request: &HttpRequest,
    is_asset: impl Fn(&str) -> bool,
) -> Result<Caller, Problem> {
    let address =
        || request.peer_addr().map_or_else(|| "unknown".to_owned(), |peer| peer.ip().to_string());
    let Some(keys) = keys else {
        return Ok(Caller { name: address(), admin: true, votes_on_all: true });
    };
    let need = need(request.method(), request.match_pattern().as_deref(), is_asset);
    let found = secret(request).and_then(|secret| keys.find(secret));
    match (need, found) {
        (Need::Nothing, None) => Ok(Caller { name: address(), ..Caller::nobody() }),
        (_, None) => Err(Problem::new(
            Kind::Unauthorized,
            "send an API key as `Authorization: Bearer KEY` or `X-API-Key: KEY`",
        )),
        (Need::Scope(any), Some(key)) if !any.iter().any(|scope| key.scopes.contains(scope)) => {
            let names: Vec<_> = any.iter().map(|s| format!("{s:?}").to_lowercase()).collect();
            let detail = format!("the key {} has not the scope {}", key.id, names.join(" or "));
            Err(Problem::new(Kind::Forbidden, detail))
        }
        (_, Some(key)) => {
            let has = |scope| key.scopes.contains(&scope);
            let (admin, votes_on_all) = (has(Scope::Admin), has(Scope::Admin) || has(Scope::Vote));
            Ok(Caller { name: key.id.clone(), admin, votes_on_all })
        }
    }
}

fn secret(request: &HttpRequest) -> Option<&[u8]> {
    let headers = request.headers();
    if let Some(value) = headers.get("x-api-key") {
        return Some(value.as_bytes());
    }
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(entries: &[(&str, &[&str], &str)]) -> String {
        let entry = |(id, hashes, scopes): &(&str, &[&str], &str)| {
            format!("[[key]]\nid = {id:?}\nsha256 = {hashes:?}\nscopes = {scopes}\n")
        };
        entries.iter().map(entry).collect()
    }

    #[test]
    fn a_made_key_is_found_by_its_hash_also_while_it_is_replaced() {
        let (old, old_hash) = make_key().unwrap();
        let (new, new_hash) = make_key().unwrap();
        assert_ne!(old, new);
        let scopes = "[\"generate\"]";
        let text =
            file(&[("ci", &[&old_hash, &new_hash], scopes), ("x", &[&"0".repeat(64)], scopes)]);
        let keys = Keys::parse(&text).unwrap();
        for key in [&old, &new] {
            assert_eq!(keys.find(key.as_bytes()).unwrap().id, "ci");
        }
        assert!(keys.find(b"").is_none());
        assert!(keys.find(old_hash.as_bytes()).is_none());
    }

    #[test]
    fn a_wrong_file_names_what_is_wrong() {
        let (good, scopes) = ("0".repeat(64), "[\"generate\"]");
        for (text, part) in [
            (String::new(), "no [[key]]"),
            (file(&[("a b", &[&good], scopes)]), "'a b'"),
            (file(&[("a", &[], scopes)]), "0 hashes"),
            (file(&[("a", &[&good, &good, &good], scopes)]), "3 hashes"),
            (file(&[("a", &[&good], "[]")]), "no scopes"),
            (file(&[("a", &[&good], "[\"x\"]")]), "unknown variant"),
            (file(&[("a", &["12"], scopes)]), "64 hexadecimal"),
            (file(&[("a", &[&"é".repeat(32)], scopes)]), "64 hexadecimal"),
            (file(&[("a", &[&good], scopes), ("a", &[&good], scopes)]), "two keys"),
            ("[[key]]\nid = \"a\"\nsecret = \"b\"\n".to_owned(), "unknown field"),
        ] {
            let error = Keys::parse(&text).expect_err(&text);
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn only_probes_and_the_page_are_for_everybody() {
        let asset = |path: &str| path == "/" || path == "/app.js";
        let of = |method: Method, pattern| need(&method, pattern, asset);
        for pattern in ["/livez", "/readyz", "/startupz", "/openapi.json", "/", "/app.js"] {
            assert_eq!(of(Method::GET, Some(pattern)), Need::Nothing);
        }
        for pattern in [None, Some("/metrics"), Some("/generations"), Some("/images/{name}")] {
            assert_eq!(of(Method::GET, pattern), Need::Key);
        }
        assert_eq!(of(Method::POST, Some("/generate")), Need::Scope(&[Scope::Generate]));
        let either = Need::Scope(&[Scope::Generate, Scope::Admin]);
        assert_eq!(of(Method::DELETE, Some("/new")), either);
        assert_eq!(of(Method::PUT, None), Need::Scope(&[Scope::Generate]));
    }
}
