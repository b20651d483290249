//! What one part of the bench found.

use serde_json::Value;

/// A part's result, for people and for programs.
pub(super) struct Section {
    /// Its name in the JSON, and for `--only`.
    pub(super) key: &'static str,
    pub(super) title: String,
    /// Tables and sentences in Markdown.
    pub(super) markdown: String,
    pub(super) figures: Value,
    /// What is wrong with portwatch's own answers: no figure where the answer is wrong.
    pub(super) wrong: Vec<String>,
}
