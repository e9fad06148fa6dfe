//! Numbers and settings as people read them.

use std::time::{Duration, SystemTime};

use actix_web::http::header::HttpDate;
use serde_json::Value;

use crate::engine::request::Resolved;
use crate::serve::compare::Contract;

/// 1234567 as 1,234,567.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A score in three places after the point, a large one in one.
pub fn score(value: Option<f64>) -> String {
    match value {
        Some(value) if value.abs() >= 100.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.3}"),
        None => "failed".to_owned(),
    }
}

/// How far one score is from another, with its sign.
pub fn difference(value: f64) -> String {
    format!("{value:+.3}").replace('-', "−")
}

/// Seconds; short ones in milliseconds' places.
pub fn seconds(value: f64) -> String {
    if value < 10.0 { format!("{value:.3}") } else { format!("{value:.1}") }
}

/// Milliseconds since 1970 as a date, in UTC.
pub fn date(ms: i64) -> String {
    let since = Duration::from_millis(u64::try_from(ms).unwrap_or(0));
    HttpDate::from(SystemTime::UNIX_EPOCH + since).to_string()
}

/// What every arm was allowed.
pub fn contract(contract: Option<Contract>) -> String {
    match contract {
        None => "none, costs differ".to_owned(),
        Some(Contract::EqualF(f)) => {
            format!("at most {} U-Net forwards an image for every arm", grouped(f))
        }
        Some(Contract::EqualLatencyMs(ms)) => {
            format!("as many U-Net forwards as take {} ms an image for every arm", grouped(ms))
        }
    }
}

/// What an arm was allowed and did not spend.
pub fn unused(value: &Value) -> String {
    if let Some(f) = value["f"].as_i64() {
        let sign = if f < 0 { "−" } else { "" };
        return format!("{sign}{} F", grouped(f.unsigned_abs()));
    }
    value["ms"].as_f64().map_or_else(
        || "–".to_owned(),
        |ms| {
            let sign = if ms < 0.0 { "−" } else { "" };
            format!("{sign}{} ms", grouped(ms.abs().round() as u64))
        },
    )
}

/// What an arm did, in one line.
pub fn settings(resolved: &Resolved) -> String {
    let mut parts = vec![resolved.method_name().to_owned()];
    for (name, value) in resolved.method.iter().filter(|(name, _)| *name != "name") {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        parts.push(format!("{} {value}", name.replace('_', " ")));
    }
    parts.push(format!("{} steps", resolved.steps));
    parts.push(resolved.solver.clone());
    parts.push(format!("guidance {}", resolved.guidance_scale));
    parts.extend(resolved.reward.as_ref().map(|reward| format!("searches {reward}")));
    parts.extend(resolved.adapter.as_ref().map(|adapter| format!("adapter {adapter}")));
    parts.join(" · ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_as_people_read_them() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), text);
        }
        assert_eq!(grouped(u64::MAX), "18,446,744,073,709,551,615");
        assert_eq!(
            [score(Some(0.5)), score(Some(-123.46)), score(None)],
            ["0.500", "-123.5", "failed"]
        );
        assert_eq!([seconds(0.0123), seconds(12.34)], ["0.012", "12.3"]);
        assert_eq!(date(1_764_259_200_000), "Thu, 27 Nov 2025 16:00:00 GMT");
        assert_eq!(unused(&json!({"f": -1900})), "−1,900 F");
        assert_eq!(unused(&json!({"ms": 2012.6})), "2,013 ms");
        assert_eq!(unused(&json!({"ms": -12.6})), "−13 ms");
        assert_eq!([difference(0.25), difference(-0.5)], ["+0.250", "−0.500"]);
        assert_eq!(unused(&Value::Null), "–");
    }
}
