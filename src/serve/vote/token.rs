//! Ballots' tokens: a random name signed with the server's secret, so that nobody makes one up.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::{Error, Result};

/// Bytes of a secret, and of a ballot's name.
const SECRET: usize = 32;
const NAME: usize = 16;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Random bytes in hexadecimal digits.
fn random<const N: usize>() -> Result<String> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| Error::invalid("random numbers", e.to_string()))?;
    Ok(hex(&bytes))
}

/// A new secret.
///
/// # Errors
/// The system gives no random numbers.
pub fn secret() -> Result<String> {
    random::<SECRET>()
}

fn sign(secret: &str, name: &str) -> Result<Hmac<Sha256>> {
    let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(secret.as_bytes())
        .map_err(|e| Error::invalid("secret", e.to_string()))?;
    mac.update(name.as_bytes());
    Ok(mac)
}

/// A new ballot's name, and the token that its voter gets.
///
/// # Errors
/// As [`secret`].
pub fn make(secret: &str) -> Result<(String, String)> {
    let name = random::<NAME>()?;
    let token = format!("{name}.{}", hex(&sign(secret, &name)?.finalize().into_bytes()));
    Ok((name, token))
}

/// The name that a token of this server has; compared in constant time.
#[must_use]
pub fn read<'a>(secret: &str, token: &'a str) -> Option<&'a str> {
    let (name, signature) = token.split_once('.')?;
    let digits = |i: usize| u8::from_str_radix(signature.get(2 * i..2 * i + 2)?, 16).ok();
    let bytes = (0..signature.len() / 2).map(digits).collect::<Option<Vec<u8>>>()?;
    let mac = sign(secret, name).ok()?;
    (signature.len() == 64 && mac.verify_slice(&bytes).is_ok()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_signed_is_read() {
        let (ours, other) = (secret().unwrap(), secret().unwrap());
        let (name, token) = make(&ours).unwrap();
        assert_eq!(read(&ours, &token), Some(name.as_str()));
        assert_eq!(read(&other, &token), None);
        let changed = format!("{}{}", if token.starts_with('0') { "1" } else { "0" }, &token[1..]);
        for wrong in ["", ".", &name, &changed, &format!("{token}00"), &token[..96], "é.é"] {
            assert_eq!(read(&ours, wrong), None, "{wrong}");
        }
        assert_ne!(make(&ours).unwrap().1, token);
    }
}
