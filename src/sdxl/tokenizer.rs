//! CLIP's byte-pair tokenizer, read from a `tokenizer` folder.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{self, NormalizerWrapper};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::config::read_json;
use super::open_ai_words::OpenAiWords;
use crate::{Error, Result};

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// CLIP's word pattern.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

#[derive(Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    model_max_length: Option<f64>,
    #[serde(default)]
    pad_token: Option<Value>,
}

/// Text → a row of exactly `max_length` token ids: start, words, end, padding.
#[derive(Clone, Debug)]
pub struct ClipTokenizer {
    words: Words,
    start: u32,
    end: u32,
    pad: u32,
    max_length: usize,
}

/// Text → the ids of its words.
#[derive(Clone, Debug)]
enum Words {
    Read(Box<Tokenizer>),
    OpenAi(OpenAiWords),
}

impl ClipTokenizer {
    /// CLIP's own vocabulary, which both towers of SDXL share. `pad` is `<|endoftext|>` for the
    /// first tower and `!` for the second.
    ///
    /// # Errors
    /// When `pad` is no token of the vocabulary.
    pub fn open_ai(pad: &str) -> Result<Self> {
        let words = OpenAiWords::new([START, END, pad])?;
        let [start, end, pad] = words.special();
        Ok(Self { words: Words::OpenAi(words), start, end, pad, max_length: 77 })
    }

    /// Reads `tokenizer.json`, or `vocab.json` and `merges.txt`, and the
    /// padding token and length from `tokenizer_config.json`.
    ///
    /// # Errors
    /// Names the file that is missing or wrong.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let config: TokenizerConfig = read_json(&folder.join("tokenizer_config.json"))?;
        let (vocab, merges, whole) =
            (folder.join("vocab.json"), folder.join("merges.txt"), folder.join("tokenizer.json"));
        let mut inner = if vocab.is_file() && merges.is_file() {
            from_files(&vocab, &merges)?
        } else if whole.is_file() {
            Tokenizer::from_file(&whole).map_err(|e| Error::file(&whole, e))?
        } else {
            return Err(Error::file(
                folder,
                "expected vocab.json and merges.txt, or tokenizer.json",
            ));
        };
        let pad = match &config.pad_token {
            Some(Value::String(token)) => token.as_str(),
            Some(Value::Object(token)) => {
                token.get("content").and_then(Value::as_str).unwrap_or(END)
            }
            _ => END,
        };
        // As in transformers: these are whole wherever they stand in a text, in any case.
        let special = [START, END, pad].map(|t| AddedToken::from(t, true).normalized(true));
        inner.add_special_tokens(special).map_err(|e| Error::file(folder, e))?;
        let id = |token: &str| {
            let missing =
                || Error::file(folder, format!("the vocabulary lacks the token '{token}'"));
            inner.token_to_id(token).ok_or_else(missing)
        };
        let max_length = match config.model_max_length {
            Some(n) if (2.0..=100_000.0).contains(&n) => n as usize,
            _ => 77,
        };
        let (start, end, pad) = (id(START)?, id(END)?, id(pad)?);
        Ok(Self { start, end, pad, max_length, words: Words::Read(Box::new(inner)) })
    }

    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// The same tokenizer with another row length (at least 2).
    pub fn with_max_length(mut self, max_length: usize) -> Self {
        self.max_length = max_length.max(2);
        self
    }

    /// # Errors
    /// When the tokenizer itself fails on the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let words = self.word_ids(text)?.into_iter().take(self.max_length - 2);
        let mut ids: Vec<u32> = std::iter::once(self.start).chain(words).collect();
        ids.push(self.end);
        ids.resize(self.max_length, self.pad);
        Ok(ids)
    }

    /// Whether [`Self::encode`] leaves out the text's end.
    ///
    /// # Errors
    /// When the tokenizer itself fails on the text.
    pub fn truncates(&self, text: &str) -> Result<bool> {
        Ok(self.word_ids(text)?.len() > self.max_length - 2)
    }

    /// The ids of a text's words, all of them.
    fn word_ids(&self, text: &str) -> Result<Vec<u32>> {
        let failed =
            |e: tokenizers::Error| Error::invalid("prompt", format!("cannot be tokenized: {e}"));
        match &self.words {
            Words::Read(inner) => {
                Ok(inner.encode_fast(text, false).map_err(failed)?.get_ids().to_vec())
            }
            Words::OpenAi(words) => words.ids(text).map_err(failed),
        }
    }
}

/// The pipeline that transformers builds for CLIP: NFC, spaces joined, lower
/// case; CLIP's words; bytes as characters; merges with `</w>` at word ends.
fn from_files(vocab: &Path, merges: &Path) -> Result<Tokenizer> {
    let bad = |e: tokenizers::Error| Error::file(vocab, e);
    let bpe = BPE::from_file(&vocab.to_string_lossy(), &merges.to_string_lossy())
        .unk_token(END.into())
        .end_of_word_suffix("</w>".into())
        .build()
        .map_err(bad)?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_normalizer(Some(normalizer().map_err(bad)?)).map_err(bad)?;
    let words =
        Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true)
            .map_err(bad)?;
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![
        PreTokenizerWrapper::Split(words),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true)),
    ])));
    Ok(tokenizer)
}

/// NFC, spaces joined, lower case: what CLIP's tokenizer does to a text first.
pub(super) fn normalizer() -> tokenizers::Result<normalizers::Sequence> {
    let spaces = normalizers::replace::ReplacePattern::Regex(r"\s+".into());
    Ok(normalizers::Sequence::new(vec![
        NormalizerWrapper::NFC(normalizers::NFC),
        NormalizerWrapper::Replace(normalizers::Replace::new(spaces, " ")?),
        NormalizerWrapper::Lowercase(normalizers::Lowercase),
    ]))
}
