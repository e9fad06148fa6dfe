//! Finished sweeps in a folder, to look at: what `ds-bench nfe-sweep` wrote, read only.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

/// The most sweeps that are shown, and bytes of a file that is read.
const MOST: usize = 64;
const MOST_BYTES: u64 = 4 << 20;

/// One method at one budget.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Point {
    pub method: String,
    pub budget: Option<f64>,
    /// Images.
    pub n: f64,
    pub prompts: Option<f64>,
    /// Means per image.
    pub f: f64,
    pub v: Option<f64>,
    pub y: Option<f64>,
    pub seconds: Option<f64>,
    /// By reward: `mean`, `low`, `high`, and `diff_mean`, `diff_low`, `diff_high` where the table has them.
    pub scores: BTreeMap<String, BTreeMap<String, f64>>,
}

/// One sweep.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sweep {
    pub id: String,
    pub model: Value,
    pub reward: Value,
    pub held_out: Value,
    pub guidance_scale: Value,
    pub prompts: usize,
    pub seeds: usize,
    pub points: Vec<Point>,
}

/// The sweeps of a folder by name; what is no sweep is left out, with a line in the log where it looks
/// like one. None where there is no folder. Blocks.
#[must_use]
pub fn sweeps(folder: &Path) -> Vec<Sweep> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .filter_map(Result::ok)
        // Not where links lead.
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)))
        .collect();
    names.sort();
    names.truncate(MOST);
    let read = |name: String| {
        let place = folder.join(&name);
        match sweep(&place, &name) {
            Ok(found) => found,
            Err(message) => {
                tracing::warn!(sweep = name, message, "a sweep was left out");
                None
            }
        }
    };
    names.into_iter().filter_map(read).collect()
}

fn text(path: &Path) -> Result<Option<String>, String> {
    let Ok(about) = std::fs::symlink_metadata(path) else { return Ok(None) };
    if !about.is_file() || about.len() > MOST_BYTES {
        return Err(format!("{} is no file of at most {MOST_BYTES} bytes", path.display()));
    }
    std::fs::read_to_string(path).map(Some).map_err(|e| format!("{}: {e}", path.display()))
}

fn sweep(folder: &Path, name: &str) -> Result<Option<Sweep>, String> {
    let (Some(about), Some(table)) =
        (text(&folder.join("sweep.json"))?, text(&folder.join("summary.csv"))?)
    else {
        return Ok(None);
    };
    let about: Value = serde_json::from_str(&about).map_err(|e| format!("sweep.json: {e}"))?;
    let config = &about["config"];
    let count = |field: &str| config[field].as_array().map_or(0, Vec::len);
    Ok(Some(Sweep {
        id: name.to_owned(),
        model: config["model"]["id"].clone(),
        reward: config["reward"].clone(),
        held_out: config["held_out"].clone(),
        guidance_scale: config["guidance_scale"].clone(),
        prompts: count("prompts"),
        seeds: count("seeds"),
        points: points(&table).map_err(|e| format!("summary.csv: {e}"))?,
    }))
}

/// Rows of a table with the columns `method`, `n` and `f`, and `REWARD_mean` of each reward.
fn points(table: &str) -> Result<Vec<Point>, String> {
    let mut reader = csv::Reader::from_reader(table.as_bytes());
    let columns: Vec<String> =
        reader.headers().map_err(|e| e.to_string())?.iter().map(str::to_owned).collect();
    let at = |name: &str| columns.iter().position(|column| column == name);
    let needed = |name: &str| at(name).ok_or_else(|| format!("there is no column {name}"));
    let (method, n, f) = (needed("method")?, needed("n")?, needed("f")?);
    let rewards: Vec<&str> = columns
        .iter()
        .filter_map(|column| column.strip_suffix("_mean"))
        .filter(|name| !name.ends_with("_diff"))
        .collect();
    let mut points = Vec::new();
    for (line, row) in reader.records().enumerate() {
        let row = row.map_err(|e| e.to_string())?;
        let number =
            |at: usize| row.get(at).and_then(|t| t.parse::<f64>().ok()).filter(|v| v.is_finite());
        let of = |name: &str| at(name).and_then(number);
        let Some(n) = number(n) else { return Err(format!("row {}: n is no number", line + 1)) };
        if n == 0.0 {
            // The method can do nothing with this budget.
            continue;
        }
        let Some(f) = number(f) else { return Err(format!("row {}: f is no number", line + 1)) };
        let parts = ["mean", "low", "high", "diff_mean", "diff_low", "diff_high"];
        let score = |reward: &&str| {
            let found = parts
                .iter()
                .filter_map(|part| Some(((*part).to_owned(), of(&format!("{reward}_{part}"))?)));
            ((*reward).to_owned(), found.collect())
        };
        points.push(Point {
            method: row.get(method).unwrap_or("").to_owned(),
            budget: of("budget"),
            n,
            prompts: of("prompts"),
            f,
            v: of("v"),
            y: of("y"),
            seconds: of("seconds"),
            scores: rewards.iter().map(score).collect(),
        });
    }
    Ok(points)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_bench_wrote_is_read_and_what_is_broken_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, about: &str, table: &str| {
            let place = folder.path().join(name);
            std::fs::create_dir(&place).unwrap();
            std::fs::write(place.join("sweep.json"), about).unwrap();
            std::fs::write(place.join("summary.csv"), table).unwrap();
        };
        let about = r#"{"config": {"model": {"id": "tiny"}, "reward": "clip", "held_out": "judge",
            "guidance_scale": 3, "prompts": ["a", "b"], "seeds": [0]}}"#;
        let table = "method,budget,n,f,seconds,clip_mean,clip_low,clip_high,clip_diff_mean,judge_mean\n\
                     plain,100,2,100,0.5,0.7,0.6,0.8,,0.5\ndemon,500,2,498.5,,,,,,0.25\n\
                     plain,1000,0,,,,,,,\n";
        write("good", about, table);
        write("no-json", "{", table);
        write("no-f", about, "method,n\nplain,2\n");
        write("no-number", about, "method,n,f\nplain,2,many\n");
        std::fs::create_dir(folder.path().join("empty")).unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(folder.path().join("good"), folder.path().join("link")).unwrap();
        let found = sweeps(folder.path());
        assert_eq!(found.len(), 1);
        let good = &found[0];
        assert_eq!((good.id.as_str(), good.prompts, good.seeds), ("good", 2, 1));
        assert_eq!((&good.model, &good.held_out), (&"tiny".into(), &"judge".into()));
        let [plain, demon] = &good.points[..] else { panic!("{:?}", good.points) };
        assert_eq!((plain.f, plain.budget, plain.seconds), (100.0, Some(100.0), Some(0.5)));
        let clip = &plain.scores["clip"];
        assert_eq!((clip["low"], clip.get("diff_mean"), plain.scores.len()), (0.6, None, 2));
        assert_eq!((demon.f, demon.seconds, demon.scores["clip"].len()), (498.5, None, 0));
        assert!(sweeps(&folder.path().join("absent")).is_empty());
    }
}
