//! Blind votes from comparison to table.

use std::collections::BTreeSet;

use diffusion_sharpening::serve::{Settings, auth};
use serde_json::{Value, json};

use crate::fake::Fake;
use crate::harness::{Answer, Server, server, server_with, settings, settings_in};

fn compare(server: &Server, prompt: &str, images: u32) {
    let body = json!({
        "base": {"prompt": prompt, "steps": 2, "seed": 5, "n": images},
        "arms": [{"label": "one"}, {"method": "best-of-n", "label": "two"}, {"label": "three"}],
        "contract": {"equal_f": 40},
    });
    let answer = server.send("POST", "/compare", &[], &body);
    assert_eq!(answer.status, 200, "{}", answer.text());
}

fn ballot(server: &Server, voter: &str) -> Answer {
    server.send("POST", "/ballots", &[], &json!({ "voter": voter }))
}

fn vote(server: &Server, token: &Value, choice: &str) -> Answer {
    server.send("POST", "/votes", &[], &json!({"token": token, "choice": choice}))
}

/// Votes without looking until there is nothing left to vote on; what was shown.
fn vote_on_all(server: &Server, voter: &str) -> Vec<Value> {
    let mut revealed = Vec::new();
    loop {
        let ballot = ballot(server, voter);
        if ballot.status == 204 {
            return revealed;
        }
        assert_eq!(ballot.status, 201, "{}", ballot.text());
        let ballot = ballot.json();
        let choice = ["left", "right", "tie", "both-bad"][revealed.len() % 4];
        let shown = vote(server, &ballot["token"], choice);
        assert_eq!(shown.status, 201, "{}", shown.text());
        revealed.push(shown.json());
        assert!(revealed.len() < 100);
    }
}

#[test]
fn a_ballot_hides_who_made_what_until_the_vote() {
    let server = server();
    assert_eq!(ballot(&server, "me").status, 204);
    compare(&server, "a red circle", 1);
    let given = ballot(&server, "me");
    assert_eq!((given.status, given.header("cache-control")), (201, "no-store"));
    let text = given.text().to_lowercase();
    for word in ["plain", "best-of-n", "one", "two", "three", "generations"] {
        assert!(!text.contains(word), "{text} has {word}");
    }
    let given = given.json();
    assert_eq!(given["prompt"], "a red circle");
    assert_eq!(given["contract"], "equal_f:40");
    let mut files = BTreeSet::new();
    for side in ["left", "right"] {
        let image = server.get(given[side].as_str().unwrap());
        assert_eq!((image.status, image.header("content-type")), (200, "image/png"));
        assert_eq!(image.header("cache-control"), "no-store");
        let reader = png::Decoder::new(std::io::Cursor::new(&image.bytes)).read_info().unwrap();
        let info = reader.info();
        assert!(info.uncompressed_latin1_text.is_empty() && info.utf8_text.is_empty());
        assert!(info.compressed_latin1_text.is_empty());
        files.insert(image.bytes);
    }
    assert_eq!(files.len(), 2);
    let shown = vote(&server, &given["token"], "left");
    assert_eq!(shown.status, 201);
    let shown = shown.json();
    let mut players =
        [&shown["left"]["player"], &shown["right"]["player"]].map(|p| p.as_str().unwrap());
    players.sort_unstable();
    assert_eq!(players, ["best-of-n", "plain"]);
    assert!(shown["left"]["cost"]["f"].as_u64().unwrap() <= 40, "{shown}");
    assert_eq!(vote(&server, &given["token"], "right").problem(409).0, "conflict");
    assert_eq!(server.metric("ds_votes_total{choice=\"left\"}"), 1.0);
}

#[test]
fn wrong_ballots_are_refused() {
    let server = server();
    compare(&server, "a", 1);
    let given = ballot(&server, "me").json();
    let token = given["token"].as_str().unwrap();
    let other = if token.starts_with('0') { "1" } else { "0" };
    for wrong in [json!(format!("{other}{}", &token[1..])), json!(""), json!("a.b")] {
        let refused = vote(&server, &wrong, "left").problem(422);
        assert_eq!((refused.0.as_str(), &refused.1["field"]), ("invalid-value", &json!("token")));
        let path = format!("/ballots/{}/left.png", wrong.as_str().unwrap());
        assert!([404, 422].contains(&server.get(&path).status));
    }
    assert_eq!(vote(&server, &given["token"], "perhaps").problem(422).1["field"], "choice");
    assert_eq!(vote(&server, &Value::Null, "left").problem(400).1["field"], "token");
    assert_eq!(server.get(&format!("/ballots/{token}/middle.png")).problem(404).0, "not-found");
    for voter in ["", "a b", "<b>", &"x".repeat(65)] {
        assert_eq!(ballot(&server, voter).problem(422).1["field"], "voter");
    }
    // After an hour it is gone, and a ballot that is gone is not used.
    let data = tempfile::tempdir().unwrap();
    let data = data.path();
    let server = server_with(settings_in(data), Fake::default());
    compare(&server, "a", 1);
    let given = ballot(&server, "me").json();
    let db = rusqlite::Connection::open(data.join("history.sqlite")).unwrap();
    db.execute("UPDATE ballot SET created_ms = created_ms - 3600001", []).unwrap();
    assert_eq!(vote(&server, &given["token"], "left").problem(410).0, "expired");
    assert_eq!(server.get(given["left"].as_str().unwrap()).problem(410).0, "expired");
    ballot(&server, "me");
    let left: u32 = db.query_row("SELECT count(*) FROM ballot", [], |row| row.get(0)).unwrap();
    assert_eq!(left, 1);
}

#[test]
fn votes_make_a_table_and_outlive_server_and_images() {
    let data = tempfile::tempdir().unwrap();
    let data = data.path();
    let server = server_with(settings_in(data), Fake::default());
    assert_eq!(server.get("/leaderboard").json()["groups"], json!([]));
    for prompt in ["a", "b", "c", "d", "e", "f"] {
        compare(&server, prompt, 2);
    }
    let shown = vote_on_all(&server, "me");
    // Two arms of plain, two images each, against one of best-of-n.
    let pairs = shown.iter().filter(|s| s["left"]["player"] != s["right"]["player"]).count();
    assert!(pairs >= 24, "{pairs}");
    vote_on_all(&server, "you");
    let table = server.get("/leaderboard").json();
    assert_eq!(table["voters"], 2);
    assert_eq!(table["prompts"], 6);
    assert_eq!(table["contracts"], json!(["equal_f:40"]));
    assert_eq!(server.get("/leaderboard?contract=equal_f:40").json()["votes"], table["votes"]);
    assert_eq!(server.get("/leaderboard?contract=equal_f:41").json()["votes"], 0);
    assert_eq!(server.get("/leaderboard?x=1").problem(400).0, "invalid-query");
    let group = &table["groups"][0];
    assert_eq!(group["players"], json!(["best-of-n", "plain"]));
    assert_eq!(group["votes"], 48);
    // Votes by chance: one time in twenty the interval of their difference is beyond 0.
    let difference = &group["versus"][0]["difference"];
    let [low, high] = ["low", "high"].map(|end| difference[end].as_f64().unwrap());
    assert_eq!(group["versus"][0]["better"].is_null(), low <= 0.0 && 0.0 <= high, "{group}");
    let listed = server.get("/generations?limit=200").json();
    for generation in listed["generations"].as_array().unwrap() {
        server.delete(&format!("/history/{}", generation["id"].as_str().unwrap()));
    }
    drop(server);
    let server = server_with(settings_in(data), Fake::default());
    assert_eq!(server.get("/leaderboard").json(), table);
    assert_eq!(ballot(&server, "me").status, 204);
}

#[test]
fn a_day_has_so_many_votes() {
    let server = server_with(Settings { votes_per_day: 2, ..settings() }, Fake::default());
    compare(&server, "a", 2);
    for _ in 0..2 {
        let given = ballot(&server, "me").json();
        assert_eq!(vote(&server, &given["token"], "tie").status, 201);
    }
    let refused = ballot(&server, "me");
    assert_eq!(refused.problem(429).0, "vote-limit");
    let wait: u64 = refused.header("retry-after").parse().unwrap();
    assert!((80_000..=86_400).contains(&wait), "{wait}");
    assert_eq!(ballot(&server, "you").status, 201);
}

#[test]
fn keys_say_who_votes_and_on_what() {
    let made: Vec<(String, String)> = (0..3).map(|_| auth::make_key().unwrap()).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    let scopes = ["generate", "vote", "generate"];
    let entry = |(i, (_, hash)): (usize, &(String, String))| {
        format!("[[key]]\nid = \"k{i}\"\nsha256 = [{hash:?}]\nscopes = [{:?}]\n", scopes[i])
    };
    let text: String = made.iter().enumerate().map(entry).collect();
    std::fs::write(file.path(), text).unwrap();
    let settings = Settings { keys: file.path().to_path_buf(), ..settings() };
    let server = server_with(settings, Fake::default());
    let send = |key: usize, method: &str, path: &str, body: &Value| {
        let header = format!("Bearer {}", made[key].0);
        server.send(method, path, &[("authorization", &header)], body)
    };
    let body = json!({"base": {"prompt": "a", "steps": 2}, "arms": [{}, {"method": "best-of-n"}],
        "contract": {"equal_f": 40}});
    assert_eq!(send(0, "POST", "/compare", &body).status, 200);
    assert_eq!(send(1, "POST", "/compare", &body).problem(403).0, "forbidden");
    let none = json!({});
    let given = send(0, "POST", "/ballots", &none);
    assert_eq!(given.status, 201, "its own");
    let cast = json!({"token": given.json()["token"], "choice": "tie"});
    assert_eq!(send(1, "POST", "/votes", &cast).problem(422).1["field"], "token", "another's");
    assert_eq!(send(0, "POST", "/votes", &cast).status, 201);
    assert_eq!(send(1, "POST", "/ballots", &none).status, 201, "everybody's");
    assert_eq!(send(2, "POST", "/ballots", &none).status, 204);
    let named = send(0, "POST", "/ballots", &json!({"voter": "x"}));
    assert_eq!(named.problem(422).1["field"], "voter");
    assert_eq!(server.send("POST", "/ballots", &[], &none).problem(401).0, "unauthorized");
}

#[test]
fn a_pair_is_voted_on_once_however_many_ballots_are_out() {
    let server = server_with(Settings { votes_per_day: 3, ..settings() }, Fake::default());
    let body = json!({"base": {"prompt": "a", "steps": 2}, "arms": [{}, {"method": "best-of-n"}],
        "contract": {"equal_f": 40}});
    assert_eq!(server.send("POST", "/compare", &[], &body).status, 200);
    // There is one pair, on either side.
    let tokens: Vec<Value> = (0..8).map(|_| ballot(&server, "me").json()["token"].take()).collect();
    let answers: Vec<u16> = tokens.iter().map(|t| vote(&server, t, "left").status).collect();
    assert_eq!(answers, [201, 409, 409, 409, 409, 409, 409, 409]);
    assert_eq!(server.get("/leaderboard").json()["votes"], 1);
    assert_eq!(vote(&server, &ballot(&server, "you").json()["token"], "left").status, 201);
    assert_eq!(server.get("/leaderboard").json()["votes"], 2, "the table is made anew");
    // Ballots that are out count when they are used.
    for prompt in ["b", "c", "d"] {
        compare(&server, prompt, 2);
    }
    let tokens: Vec<Value> =
        (0..40).map(|_| ballot(&server, "you").json()["token"].take()).collect();
    let answers: Vec<u16> = tokens.iter().map(|t| vote(&server, t, "tie").status).collect();
    assert_eq!(answers.iter().filter(|status| **status == 201).count(), 2, "{answers:?}");
    // The others are of a pair that has its vote, or one too many; of which pair is by chance.
    assert!(answers.contains(&429), "{answers:?}");
    assert!(answers.iter().all(|status| [201, 409, 429].contains(status)), "{answers:?}");
}

#[test]
fn what_arms_have_from_the_base_is_theirs() {
    let server = server();
    let body = json!({"base": {"prompt": "a", "steps": 2, "method": "best-of-n", "adapter": "sharpened"},
        "arms": [{}, {"method": "plain", "adapter": null}], "contract": {"equal_f": 40}});
    assert_eq!(server.send("POST", "/compare", &[], &body).status, 200);
    let shown = vote(&server, &ballot(&server, "me").json()["token"], "left").json();
    let players: BTreeSet<_> =
        ["left", "right"].map(|side| shown[side]["player"].as_str().unwrap()).into();
    assert_eq!(players, BTreeSet::from(["best-of-n@sharpened", "plain"]));
}

#[test]
fn comparisons_without_a_contract_hide_none_that_have_one() {
    let data = tempfile::tempdir().unwrap();
    let server = server_with(settings_in(data.path()), Fake::default());
    compare(&server, "a", 1);
    let without =
        json!({"base": {"prompt": "b", "steps": 2}, "arms": [{}, {"method": "best-of-n"}]});
    let without = server.send("POST", "/compare", &[], &without).json();
    // More of them than are looked at, all newer.
    let db = rusqlite::Connection::open(data.path().join("history.sqlite")).unwrap();
    let columns: Vec<String> = db
        .prepare("SELECT name FROM pragma_table_info('generation') WHERE name <> 'id'")
        .unwrap()
        .query_map([], |row| row.get(0))
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    let columns = columns.join(", ");
    db.execute_batch(&format!(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2500)
         INSERT INTO generation (id, {columns})
         SELECT g.id || '-' || n.i, {columns} FROM generation AS g, n WHERE g.id = '{}'",
        without["arms"][0]["id"].as_str().unwrap()
    ))
    .unwrap();
    assert_eq!(ballot(&server, "me").status, 201);
}
