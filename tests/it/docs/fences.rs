//! The code blocks of a page.

use super::pages;
use std::fs;
use std::path::Path;

/// A code block, with what the page says about it.
#[derive(Debug, Clone)]
pub struct Block {
    pub page: String,
    /// The line of the opening fence.
    pub line: usize,
    pub language: String,
    /// Without the indentation of the fence.
    pub text: String,
    /// The content of the HTML comment on the line before the fence.
    pub marker: Option<String>,
}

impl Block {
    pub fn place(&self) -> String {
        format!("{}:{}", self.page, self.line)
    }

    /// The rest of a marker such as `<!-- not run: REASON -->`.
    pub fn marked(&self, name: &str) -> Option<&str> {
        self.marker
            .as_deref()?
            .strip_prefix(name)?
            .strip_prefix(':')
            .map(str::trim)
    }
}

/// Pages whose commands a reader is expected to type.
pub fn has_commands(page: &str) -> bool {
    page == "README.md" || page.contains("/tutorial/") || page.contains("/how-to/")
}

/// The blocks of every page.
pub fn blocks() -> Vec<Block> {
    let mut found = Vec::new();
    for path in pages() {
        let page = path.strip_prefix(super::ROOT).unwrap_or(Path::new(""));
        found.extend(blocks_of(
            page.to_str().unwrap(),
            &fs::read_to_string(&path).unwrap(),
        ));
    }
    found
}

pub fn blocks_of(page: &str, text: &str) -> Vec<Block> {
    let mut found = Vec::new();
    let mut open: Option<(Block, usize, String)> = None;
    let mut last = "";
    for (number, line) in (1..).zip(text.lines()) {
        let trimmed = line.trim_start();
        let fence: String = trimmed
            .chars()
            .take_while(|sign| matches!(sign, '`' | '~'))
            .collect();
        match &mut open {
            Some((block, _, opening)) if trimmed.trim_end() == opening => {
                found.push(block.clone());
                open = None;
            }
            Some((block, indent, _)) => {
                let start = line.len() - trimmed.len();
                block.text.push_str(&line[start.min(*indent)..]);
                block.text.push('\n');
            }
            None if fence.len() >= 3 => {
                let marker = last
                    .trim()
                    .strip_prefix("<!-- ")
                    .and_then(|rest| rest.strip_suffix(" -->"));
                let block = Block {
                    page: page.to_owned(),
                    line: number,
                    language: trimmed[fence.len()..].trim().to_owned(),
                    text: String::new(),
                    marker: marker.map(str::to_owned),
                };
                open = Some((block, line.len() - trimmed.len(), fence));
            }
            None => {}
        }
        if !trimmed.is_empty() {
            last = line;
        }
    }
    assert!(open.is_none(), "{page}: a code block does not end");
    found
}

/// The page without its code blocks.
pub fn prose(text: &str) -> String {
    let mut prose = String::new();
    let mut fence: Option<&str> = None;
    for line in text.lines() {
        let trimmed = line.trim();
        let is_fence = trimmed.starts_with("```") || trimmed.starts_with("~~~");
        match fence {
            Some(opening) if trimmed == opening => fence = None,
            Some(_) => {}
            None if is_fence => fence = Some(&trimmed[..3]),
            None => prose.push_str(line),
        }
        prose.push('\n');
    }
    prose
}

/// Languages that a page with commands may name. `sh` is run; `text` is output or a drawing.
const LANGUAGES: [&str; 8] = [
    "sh", "toml", "json", "text", "ini", "nginx", "python", "yaml",
];

/// Words that begin a command line, which belongs in a block of `sh`.
const COMMANDS: [&str; 12] = [
    "$",
    "#!",
    "cargo",
    "curl",
    "docker",
    "export",
    "git",
    "kill",
    "payrelay",
    "python3",
    "sudo",
    "systemctl",
];

#[test]
fn every_code_block_of_a_page_with_commands_names_its_language() {
    let mut wrong = Vec::new();
    for block in blocks().iter().filter(|block| has_commands(&block.page)) {
        if !LANGUAGES.contains(&&*block.language) {
            wrong.push(format!("{}: language {:?}", block.place(), block.language));
        }
        let command = block
            .text
            .lines()
            .find(|line| COMMANDS.contains(&line.split_whitespace().next().unwrap_or_default()));
        if let Some(command) = command.filter(|_| block.language != "sh") {
            wrong.push(format!("{}: a command: {command}", block.place()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn blocks_are_found_with_their_language_and_marker() {
    let page = "# A\n\n   <!-- not run: it needs root -->\n   ```sh\n   id\n     x\n   ```\n\n```\n\
        y\n```\n";
    let found = blocks_of("a.md", page);
    assert_eq!(found.len(), 2, "{found:#?}");
    assert_eq!(found[0].language, "sh");
    assert_eq!(found[0].text, "id\n  x\n");
    assert_eq!(found[0].marked("not run"), Some("it needs root"));
    assert_eq!(found[1].language, "");
    assert_eq!(found[1].marked("not run"), None);
    assert_eq!(
        prose(page).trim_end(),
        "# A\n\n   <!-- not run: it needs root -->".to_owned()
    );
}
