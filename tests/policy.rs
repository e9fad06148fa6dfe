//! Rules that hold for the source itself.

use std::path::{Path, PathBuf};

/// The floors of src/lib.rs from the ground up; modules in one entry may use
/// each other, except where `APART` says otherwise.
const FLOORS: [&[&str]; 9] = [
    &["error", "progress", "util"],
    &["nn"],
    &["sdxl"],
    &["diffusion"],
    &["data"],
    &["rewards"],
    &["search", "train"],
    &["engine"],
    &["bench", "serve"],
];
const APART: [&str; 2] = ["bench", "serve"];

struct Source {
    /// Relative to src.
    path: String,
    /// Without comments, string contents and what follows the first `#[cfg(test)]`.
    code: Vec<String>,
    lines: usize,
}

fn files(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    files(&root, &mut paths);
    paths.sort();
    assert!(paths.len() > 50, "only {} files", paths.len());
    let source = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        let tests = text.find("#[cfg(test)]").unwrap_or(text.len());
        Source {
            path: path.strip_prefix(&root).unwrap().to_string_lossy().replace('\\', "/"),
            code: text[..tests].lines().map(strip).collect(),
            lines: text.lines().count(),
        }
    };
    paths.into_iter().map(source).collect()
}

/// A line without its comment and without the contents of its string literals.
fn strip(line: &str) -> String {
    let (mut out, mut quoted, mut escaped) = (String::new(), false, false);
    let mut rest = line.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '/' if !quoted && rest.peek() == Some(&'/') => break,
            // A quote as a character literal.
            '\'' if !quoted && rest.peek() == Some(&'"') => {
                rest.next();
            }
            '"' if !escaped => quoted = !quoted,
            _ if quoted => escaped = c == '\\' && !escaped,
            _ => out.push(c),
        }
        if c != '\\' {
            escaped = false;
        }
    }
    out
}

fn found(source: &Source, word: &str) -> Vec<String> {
    let hits = source.code.iter().enumerate().filter(|(_, line)| {
        line.match_indices(word).any(|(at, _)| {
            let before = line[..at].chars().next_back();
            word.starts_with('.') || before.is_none_or(|c| !c.is_alphanumeric() && c != '_')
        })
    });
    hits.map(|(i, line)| format!("{}:{}: {}", source.path, i + 1, line.trim())).collect()
}

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|names| names.contains(&module))
}

#[test]
fn the_reader_of_this_test_reads_code() {
    assert_eq!(strip(r#"let a = "x // y"; // z"#), "let a = ; ");
    assert_eq!(strip(r#"f("a\"b.unwrap()", '"'); g()"#), "f(, '); g()");
    let source = Source { path: String::new(), code: vec!["rope(x) europe(x)".into()], lines: 1 };
    assert_eq!(found(&source, "rope(").len(), 1);
    let source = Source { path: String::new(), code: vec!["europe(x)".into()], lines: 1 };
    assert!(found(&source, "rope(").is_empty());
}

/// Operations whose backward is missing, wrong or another function's.
#[test]
fn no_operation_without_a_correct_backward() {
    let mut bad = Vec::new();
    for source in sources() {
        for word in [
            "softmax_last_dim",
            "candle_nn",
            "rope(",
            "rope_i(",
            "apply_op1_no_bwd",
            "apply_op2_no_bwd",
            "apply_op3_no_bwd",
            ".apply_op1_no_bwd",
            ".apply_op2_no_bwd",
            ".apply_op3_no_bwd",
            ".gelu()",
            "upsample_nearest1d",
            "upsample_nearest2d",
            ".upsample_nearest2d",
            ".upsample_bilinear2d",
            ".max_pool2d",
            ".conv1d",
            ".conv_transpose1d",
        ] {
            bad.extend(found(&source, word));
        }
    }
    assert!(bad.is_empty(), "{bad:#?}");
}

#[test]
fn the_library_does_not_unwrap() {
    let mut bad = Vec::new();
    for source in sources() {
        for word in [".unwrap()", ".expect(", "todo!(", "unimplemented!(", "dbg!("] {
            bad.extend(found(&source, word));
        }
    }
    assert!(bad.is_empty(), "{bad:#?}");
}

#[test]
fn only_nn_is_unsafe() {
    let all = sources().into_iter().filter(|s| !s.path.starts_with("nn/"));
    let bad: Vec<String> = all.flat_map(|s| found(&s, "unsafe")).collect();
    assert!(bad.is_empty(), "{bad:#?}");
}

#[test]
fn files_stay_short() {
    let long = sources().into_iter().filter(|s| s.lines > 500);
    let long: Vec<String> = long.map(|s| format!("{}: {} lines", s.path, s.lines)).collect();
    assert!(long.is_empty(), "{long:#?}");
}

#[test]
fn a_floor_uses_only_those_below_it() {
    let (mut bad, mut uses) = (Vec::new(), 0);
    for source in sources() {
        let module = source.path.split('/').next().unwrap().trim_end_matches(".rs");
        if ["lib", "main", "bin"].contains(&module) {
            continue;
        }
        let own = floor(module).unwrap_or_else(|| panic!("{module} is not in the list of floors"));
        for line in &source.code {
            for (at, start) in line.match_indices("crate::") {
                let rest = &line[at + start.len()..];
                // `use crate::{a::b, c::d}` names one floor per entry.
                let entries: Vec<&str> = match rest.strip_prefix('{') {
                    Some(list) => list.split(',').map(str::trim).collect(),
                    None => vec![rest],
                };
                for entry in entries {
                    let name: String =
                        entry.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                    let Some(other) = floor(&name) else { continue };
                    uses += 1;
                    let apart = APART.contains(&module) && APART.contains(&name.as_str());
                    if other > own || (apart && module != name) {
                        bad.push(format!("{}: {}", source.path, line.trim()));
                    }
                }
            }
        }
    }
    assert!(uses > 80, "only {uses} uses were found");
    assert!(bad.is_empty(), "{bad:#?}");
}

/// src/lib.rs lists the floors in this file's order.
#[test]
fn the_floors_are_those_of_the_library() {
    let all = sources();
    let lib = all.iter().find(|s| s.path == "lib.rs").unwrap();
    let listed: Vec<&str> = lib
        .code
        .iter()
        .filter_map(|line| line.trim().strip_prefix("pub mod ")?.strip_suffix(';'))
        .collect();
    let expected: Vec<&str> = FLOORS.concat();
    assert_eq!(listed, expected);
}

/// The image's build sees only what .dockerignore lets through.
#[test]
fn the_container_has_what_the_program_is_made_of() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ignore = std::fs::read_to_string(root.join(".dockerignore")).unwrap();
    let passed: Vec<&str> = ignore.lines().filter_map(|line| line.strip_prefix('!')).collect();
    for path in &passed {
        assert!(root.join(path).exists(), "{path} is not there");
    }
    let (mut missing, mut seen) = (Vec::new(), 0);
    for source in sources() {
        let text = std::fs::read_to_string(root.join("src").join(&source.path)).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for file in code.split("\"../../").skip(1).map(|rest| rest.split('"').next().unwrap()) {
            // Deeper files have some of these on the way out of src.
            let file = file.trim_start_matches("../");
            seen += 1;
            if !passed.iter().any(|path| file.starts_with(&format!("{path}/"))) {
                missing.push(format!("{}: {file}", source.path));
            }
        }
    }
    assert!(seen >= 7, "only {seen} files were found");
    assert!(missing.is_empty(), "{missing:#?}");
}
