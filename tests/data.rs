//! Prompt lists and sets of captioned images, in every layout that is read.

use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;

use diffusion_sharpening::data::images::{self, Example, ImageSource, ImageTextSet};
use diffusion_sharpening::data::prompts::{self, PromptList, PromptSource};
use diffusion_sharpening::data::scenes::Split;
use diffusion_sharpening::{Error, Result};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage, Rgba, RgbaImage};
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// A file in `dir`, in a subfolder that may not be there yet.
fn put(dir: &TempDir, name: &str, bytes: impl AsRef<[u8]>) {
    let path = dir.path().join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

// Prompts.

fn prompts_of(name: &str, text: impl AsRef<[u8]>) -> Result<PromptList> {
    let dir = folder();
    put(&dir, name, text);
    let path = dir.path().join(name);
    prompts::load(&path.to_str().unwrap().parse()?)
}

#[test]
fn prompts_are_read_from_every_format() {
    let want = ["a red circle", "two \"big\" squares, blue"];
    for (name, text) in [
        ("p.txt", "\u{feff}a red circle\r\n\r\ntwo \"big\" squares, blue\n"),
        (
            "p.jsonl",
            "{\"prompt\":\"a red circle\",\"id\":1}\n\n\
             {\"prompt\":\"two \\\"big\\\" squares, blue\",\"text\":\"no\"}",
        ),
        (
            "drawbench.csv",
            "Category,Prompts\n1,a red circle\n2,\"two \"\"big\"\" squares, blue\"\n",
        ),
        ("parti.tsv", "Prompt\tCategory\na red circle\tx\ntwo \"big\" squares, blue\ty\n"),
        (
            "captions.csv",
            "\u{feff}id,Caption\n1,a red circle\n2,\"two \"\"big\"\" squares, blue\"\n",
        ),
    ] {
        let list = prompts_of(name, text).unwrap();
        assert_eq!(
            (list.prompts, list.skipped),
            (want.map(String::from).to_vec(), vec![]),
            "{name}"
        );
    }
}

#[test]
fn a_column_can_be_asked_for() {
    let dir = folder();
    put(&dir, "p.csv", "prompt,title\nno,yes\n");
    put(&dir, "p.txt", "no\n");
    let load = |name: &str| {
        let path = dir.path().join(name);
        prompts::load(&path.to_str().unwrap().parse().unwrap())
    };
    assert_eq!(load("p.csv?column=title").unwrap().prompts, ["yes"]);
    let error = load("p.csv?column=name").unwrap_err().to_string();
    assert!(error.contains("no column name among: prompt, title"), "{error}");
    // A plain list has no columns, and does not ignore that one was asked for.
    assert!(load("p.txt?column=title").unwrap_err().to_string().contains("column=title"));
}

#[test]
fn unusable_prompt_rows_are_named_and_counted() {
    let good = |n: usize| "{\"prompt\":\"a\"}\n".repeat(n);
    let list = prompts_of("p.jsonl", good(9) + "{\"promt\":\"b\"}\n").unwrap();
    assert_eq!(list.prompts.len(), 9);
    let shown = list.skipped[0].to_string();
    assert!(shown.starts_with("line 10: ") && shown.contains("promt"), "{shown}");
    // Two of ten are more than a tenth.
    let error = prompts_of("p.jsonl", good(8) + "{\"prompt\":7}\n{\n").unwrap_err().to_string();
    assert!(
        error.contains("2 of 10 rows") && error.contains("line 9: 'prompt' is no text"),
        "{error}"
    );
    let mut text = "prompt,id\n".to_owned() + &"a,1\n".repeat(20) + " ,2\n";
    let list = prompts_of("p.csv", &text).unwrap();
    assert_eq!(
        (list.prompts.len(), list.skipped[0].to_string().as_str()),
        (20, "line 22: 'prompt' is empty")
    );
    text.push_str("a,1\n");
    let mut bytes = text.into_bytes();
    bytes.extend(b"\xff\xfe,3\n");
    let list = prompts_of("p.csv", bytes).unwrap();
    assert_eq!((list.prompts.len(), list.skipped.len()), (21, 2));
    assert!(list.skipped[1].to_string().contains("line 24: 'prompt' is not UTF-8"));
    for empty in ["", "\n \n"] {
        let error = prompts_of("p.txt", empty).unwrap_err().to_string();
        assert!(error.contains("holds no prompt"), "{error}");
    }
    assert!(prompts_of("p.csv", "id,name\n1,a\n").unwrap_err().to_string().contains("id, name"));
}

#[test]
fn prompts_are_read_from_parquet() {
    let dir = folder();
    let path = dir.path().join("p.parquet");
    let texts: Vec<Option<String>> = (0..25).map(|i| (i != 7).then(|| format!("p {i}"))).collect();
    let texts: Vec<Option<&[u8]>> =
        texts.iter().map(|t| t.as_ref().map(|t| t.as_bytes())).collect();
    for compression in
        [Compression::SNAPPY, Compression::ZSTD(Default::default()), Compression::LZ4_RAW]
    {
        write_parquet(
            &path,
            "message m { OPTIONAL BYTE_ARRAY seed; OPTIONAL BYTE_ARRAY prompt; }",
            2,
            10,
            compression,
            &|_| texts.clone(),
        );
        let list = prompts::load(&path.to_str().unwrap().parse().unwrap()).unwrap();
        assert_eq!(list.prompts.len(), 24, "{compression}");
        assert_eq!((list.prompts[6].as_str(), list.prompts[7].as_str()), ("p 6", "p 8"));
        assert_eq!(list.skipped[0].to_string(), "row 7: is null");
    }
}

/// Optional columns of bytes, in row groups of `group` rows.
fn write_parquet<'a>(
    path: &Path,
    schema: &str,
    columns: usize,
    group: usize,
    compression: Compression,
    values: &dyn Fn(usize) -> Vec<Option<&'a [u8]>>,
) {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder().set_compression(compression).build();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema.clone(), properties.into()).unwrap();
    let descriptor = parquet::schema::types::SchemaDescriptor::new(schema);
    let rows = values(0).len();
    for start in (0..rows).step_by(group) {
        let mut groups = writer.next_row_group().unwrap();
        for i in 0..columns {
            let defined = descriptor.column(i).max_def_level();
            let rows = values(i)[start..rows.min(start + group)].to_vec();
            let levels: Vec<i16> =
                rows.iter().map(|v| if v.is_some() { defined } else { 0 }).collect();
            let bytes: Vec<ByteArray> = rows.into_iter().flatten().map(ByteArray::from).collect();
            let mut column = groups.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&bytes, Some(&levels), None).unwrap();
            column.close().unwrap();
        }
        groups.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn sources_are_written_as_they_are_read() {
    for text in ["scenes:train:12", "a/b.tsv", "a/b.parquet?column=x"] {
        let source: PromptSource = text.parse().unwrap();
        assert_eq!(source.to_string(), text);
        let json = serde_json::to_string(&source).unwrap();
        assert_eq!(serde_json::from_str::<PromptSource>(&json).unwrap(), source);
    }
    let held_out = PromptSource::Scenes { split: Split::Test, count: 3 };
    assert_eq!("3".parse::<PromptSource>().unwrap(), held_out);
    assert_eq!(serde_json::from_str::<PromptSource>("3").unwrap(), held_out);
    for text in ["scenes:validation:5", "scenes:train:5:9", "x", "x?image=a", "x?image=a&caption=b"]
    {
        let source: ImageSource = text.parse().unwrap();
        assert_eq!(source.to_string(), text);
        let json = serde_json::to_string(&source).unwrap();
        assert_eq!(serde_json::from_str::<ImageSource>(&json).unwrap(), source);
    }
    for (text, part) in [
        ("scenes:trian:5", "unknown split 'trian'"),
        ("scenes:train:many", "'many'"),
        ("scenes:train", "scenes:SPLIT:COUNT"),
        ("", "missing"),
        ("a?colour=b", "unknown option 'colour'"),
        ("a?column=", "column=NAME"),
    ] {
        let error = text.parse::<PromptSource>().unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
}

#[test]
fn scenes_give_the_prompts_of_their_split() {
    let list = prompts::load(&"scenes:validation:4".parse().unwrap()).unwrap();
    let want: Vec<String> = Split::Validation.prompts(4).iter().map(ToString::to_string).collect();
    assert_eq!(list.prompts, want);
    assert!(prompts::load(&"0".parse().unwrap()).is_err());
}

// Images.

/// An image of one colour, of a size of its own.
fn picture(i: u8) -> RgbImage {
    RgbImage::from_pixel(8 + u32::from(i), 6, Rgb([10 * i, 100, 200]))
}

fn encoded(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn png(i: u8) -> Vec<u8> {
    encoded(picture(i), ImageFormat::Png)
}

fn open(text: &str) -> Result<Box<dyn ImageTextSet>> {
    images::open(&text.parse()?, 32)
}

fn open_in(dir: &TempDir, rest: &str) -> Box<dyn ImageTextSet> {
    open(&format!("{}{rest}", dir.path().display())).unwrap()
}

/// What a set holds, with the message of what is broken.
fn all(set: &dyn ImageTextSet) -> Vec<Result<Example, String>> {
    (0..set.len()).map(|i| set.example(i).map_err(|e| e.to_string())).collect()
}

fn holds(example: &Result<Example, String>, name: &str, caption: &str, i: u8) {
    let example = example.as_ref().unwrap();
    assert_eq!((example.name.as_str(), example.caption.as_str()), (name, caption));
    assert_eq!(example.image, picture(i));
}

fn fails(example: &Result<Example, String>, parts: &[&str]) {
    let error = example.as_ref().unwrap_err();
    assert!(parts.iter().all(|p| error.contains(p)), "{error}");
}

#[test]
fn an_image_folder_with_metadata() {
    let rows = "{\"file_name\":\"a.png\",\"text\":\"one\"}\n\
                {\"file_name\":\"sub/b.webp\",\"text\":\"two\"}\n\
                {\"file_name\":\"gone.png\",\"text\":\"three\"}\n\
                {\"file_name\":\"broken.png\",\"text\":\"four\"}\n\
                {\"file_name\":\"a.png\"}\n\
                not json\n";
    let dir = folder();
    put(&dir, "a.png", png(1));
    put(&dir, "sub/b.webp", encoded(picture(2), ImageFormat::WebP));
    put(&dir, "broken.png", &png(3)[..40]);
    put(&dir, "metadata.jsonl", rows);
    let set = open_in(&dir, "");
    let examples = all(&*set);
    assert_eq!(examples.len(), 6);
    holds(&examples[0], "a.png", "one", 1);
    holds(&examples[1], "sub/b.webp", "two", 2);
    fails(&examples[2], &["gone.png"]);
    fails(&examples[3], &["broken.png"]);
    fails(&examples[4], &["metadata.jsonl", "no column prompt, prompts, text, caption"]);
    fails(&examples[5], &["metadata.jsonl"]);
    assert_eq!((set.name(3), set.name(5)), ("broken.png".into(), "line 6".into()));
    assert!(set.summary().contains("6 rows"));

    std::fs::remove_file(dir.path().join("metadata.jsonl")).unwrap();
    put(&dir, "metadata.csv", "file_name,text,long\na.png,one,\"one, long\"\nsub/b.webp,,x\n");
    let examples = all(&*open_in(&dir, ""));
    holds(&examples[0], "a.png", "one", 1);
    fails(&examples[1], &["metadata.csv", "'text' is empty"]);
    let examples = all(&*open_in(&dir, "?image=file_name&caption=long"));
    holds(&examples[0], "a.png", "one, long", 1);
    assert!(open(&format!("{}?caption=no", dir.path().display())).is_err());
}

#[test]
fn json_lines_with_paths() {
    let dir = folder();
    put(&dir, "imgs/000/x.png", png(1));
    put(&dir, "train.jsonl", "{\"img_path\":\"./000/x.png\",\"prompt\":\"p\",\"Task2\":{}}\n");
    let examples = all(&*open_in(&dir, "/train.jsonl"));
    holds(&examples[0], "./000/x.png", "p", 1);
}

#[test]
fn images_with_side_car_captions() {
    let dir = folder();
    for (name, bytes) in [
        ("10_cats/b.png", png(2)),
        ("10_cats/b.txt", b" two \n".to_vec()),
        ("a.png", png(1)),
        ("a.caption", b"one".to_vec()),
        ("c.png", png(3)),
        (".hidden/d.png", png(4)),
        ("notes.txt", b"no".to_vec()),
    ] {
        put(&dir, name, bytes);
    }
    let examples = all(&*open_in(&dir, ""));
    assert_eq!(examples.len(), 3);
    holds(&examples[0], "10_cats/b.png", "two", 2);
    holds(&examples[1], "a.png", "one", 1);
    fails(&examples[2], &["c.txt"]);
    let error = open(&format!("{}?caption=x", dir.path().display())).err().unwrap().to_string();
    assert!(error.contains("caption=x"), "{error}");
}

fn write_tar(dir: &TempDir, name: &str, files: &[(&str, &[u8])]) {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, *bytes).unwrap();
    }
    put(dir, name, tar.into_inner().unwrap());
}

#[test]
fn webdataset_shards() {
    let dir = folder();
    let long = format!("{}/k.png", "long".repeat(40));
    write_tar(
        &dir,
        "00000.tar",
        &[
            ("a.png", &png(1)),
            ("a.txt", b"one\n"),
            ("a.json", b"{\"prompt\":\"uno\"}"),
            ("sub/b.png", &png(2)),
            ("sub/b.json", b"{\"id\":3,\"prompt\":\"two\"}"),
            ("c.png", &png(3)),
            ("d.txt", b"four"),
            ("README", b"nothing"),
        ],
    );
    write_tar(
        &dir,
        "00001.tar",
        &[
            ("a.png", b"no image"),
            ("a.txt", b"five"),
            (&long, &png(4)),
            (&long.replace("png", "txt"), b"six"),
        ],
    );
    let set = open_in(&dir, "");
    let examples = all(&*set);
    assert_eq!(examples.len(), 6);
    holds(&examples[0], "00000.tar/a", "one", 1);
    holds(&examples[1], "00000.tar/sub/b", "two", 2);
    fails(&examples[2], &["00000.tar/c", "has no caption"]);
    fails(&examples[3], &["00000.tar/d", "has no image"]);
    fails(&examples[4], &["00001.tar/a"]);
    assert_eq!(examples[5].as_ref().unwrap().caption, "six");
    assert!(set.summary().contains("6 examples in 2 tar shards"));
    let examples = all(&*open_in(&dir, "/00000.tar?caption=prompt"));
    holds(&examples[0], "00000.tar/a", "uno", 1);

    // A shard that was not copied to its end has a broken row there.
    let bytes = std::fs::read(dir.path().join("00000.tar")).unwrap();
    put(&dir, "cut/x.tar", &bytes[..1700]);
    let examples = all(&*open_in(&dir, "/cut"));
    holds(&examples[0], "x.tar/a", "one", 1);
    assert!(examples[1..].iter().all(Result::is_err) && examples.len() > 1, "{examples:?}");
}

const POKEMON: &str = "message schema {
    OPTIONAL GROUP image { OPTIONAL BYTE_ARRAY bytes; OPTIONAL BYTE_ARRAY path (UTF8); }
    OPTIONAL BYTE_ARRAY text (UTF8);
}";

#[test]
fn parquet_with_embedded_images() {
    const ROWS: usize = 45;
    let dir = folder();
    let images: Vec<Vec<u8>> = (0..ROWS).map(|i| png(i as u8 % 9)).collect();
    let texts: Vec<String> = (0..ROWS).map(|i| format!("text {i}")).collect();
    let values = |column: usize| -> Vec<Option<&[u8]>> {
        let cell = |i: usize| match (column, i) {
            (0, 4) => None,
            (0, 5) => Some(&b"no image"[..]),
            (0, _) => Some(images[i].as_slice()),
            (1, _) => Some(&b"x.png"[..]),
            (_, 6) => None,
            _ => Some(texts[i].as_bytes()),
        };
        (0..ROWS).map(cell).collect()
    };
    // Row groups that do not divide the rows.
    for name in ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"] {
        write_parquet(&dir.path().join(name), POKEMON, 3, 40, Compression::SNAPPY, &values);
    }
    let set = open_in(&dir, "");
    let examples = all(&*set);
    assert_eq!(examples.len(), 2 * ROWS);
    for i in (0..ROWS).filter(|i| !(4..7).contains(i)) {
        let name = format!("train-00001-of-00002.parquet row {i}");
        holds(&examples[ROWS + i], &name, &texts[i], i as u8 % 9);
    }
    fails(&examples[4], &["row 4", "has no image"]);
    fails(&examples[5], &["row 5"]);
    fails(&examples[6], &["row 6", "has no caption"]);
    // In any order, and from several threads.
    std::thread::scope(|scope| {
        for start in 0..4 {
            let (set, examples) = (&set, &examples);
            scope.spawn(move || {
                for i in (0..2 * ROWS).map(|i| (i * 37 + start) % (2 * ROWS)) {
                    assert_eq!(set.example(i).ok(), examples[i].clone().ok());
                }
            });
        }
    });
    let error = open(&format!("{}?image=picture", dir.path().display())).err().unwrap();
    assert!(error.to_string().contains("image.bytes, image.path, text"), "{error}");
}

#[test]
fn scenes_are_a_set() {
    let set = open("scenes:train:7:3").unwrap();
    assert_eq!(set.len(), 7);
    let example = set.example(5).unwrap();
    assert_eq!(example.image.dimensions(), (32, 32));
    let (caption, _) = diffusion_sharpening::data::scenes::export::example(Split::Train, 3, 5);
    assert_eq!(example.caption, caption.to_string());
    assert_ne!(set.fingerprint(), open("scenes:train:7").unwrap().fingerprint());
}

#[test]
fn transparency_is_over_white_and_photographs_stand_upright() {
    let dir = folder();
    let alpha = |a: u8| RgbaImage::from_pixel(3, 3, Rgba([200, 100, 0, a]));
    put(&dir, "a.png", encoded(alpha(0), ImageFormat::Png));
    put(&dir, "b.png", encoded(alpha(51), ImageFormat::Png));
    let mut jpeg = encoded(
        RgbImage::from_fn(16, 8, |x, _| Rgb(if x < 8 { [255; 3] } else { [0; 3] })),
        ImageFormat::Jpeg,
    );
    // Orientation 6: the camera was turned, the left of the file is the top.
    let mut exif =
        b"\xff\xe1\x00\x22Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0".to_vec();
    exif.extend([0; 4]);
    jpeg.splice(2..2, exif);
    put(&dir, "c.jpg", jpeg);
    for name in ["a.txt", "b.txt", "c.txt"] {
        put(&dir, name, "x");
    }
    let examples: Vec<RgbImage> =
        all(&*open_in(&dir, "")).into_iter().map(|e| e.unwrap().image).collect();
    assert_eq!(examples[0].get_pixel(1, 1).0, [255; 3]);
    // A fifth of the colour, four fifths of white.
    assert_eq!(examples[1].get_pixel(1, 1).0, [244, 224, 204]);
    assert_eq!(examples[2].dimensions(), (8, 16));
    assert!(examples[2].get_pixel(4, 2).0[0] > 250 && examples[2].get_pixel(4, 13).0[0] < 5);
}

#[test]
fn a_fingerprint_follows_the_files_and_not_the_place() {
    let dir = folder();
    let set = |name: &str| open_in(&dir, &format!("/{name}")).fingerprint().to_owned();
    put(&dir, "one/a.png", png(1));
    put(&dir, "one/a.txt", "a");
    let before = set("one");
    assert_eq!(set("one"), before);
    std::fs::rename(dir.path().join("one"), dir.path().join("two")).unwrap();
    assert_eq!(set("two"), before);
    put(&dir, "two/a.txt", "ab");
    let caption = set("two");
    assert_ne!(caption, before);
    put(&dir, "two/b.png", png(2));
    let image = set("two");
    assert_ne!(image, caption);
    put(&dir, "two/metadata.jsonl", "{\"file_name\":\"a.png\",\"text\":\"x\"}");
    let listed = set("two");
    put(&dir, "two/metadata.jsonl", "{\"file_name\":\"a.png\",\"text\":\"y\"}");
    assert_ne!(set("two"), listed);
}

#[test]
fn what_is_no_set_says_so() {
    let dir = folder();
    for (rest, part) in [("", "holds no images"), ("/none", "expected a folder")] {
        let error = open(&format!("{}{rest}", dir.path().display())).err().unwrap();
        assert!(matches!(&error, Error::File { message, .. } if message.contains(part)), "{error}");
    }
    put(&dir, "x.parquet", "PAR1 is not enough");
    assert!(matches!(open(&dir.path().display().to_string()), Err(Error::File { .. })));
}
