//! The JSON Schema of the configuration file: the keys as the sections ask for them, described by
//! the comments of config.toml.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::source::{Display, KeyDescription};

/// The schema of these keys.
pub(super) fn schema_of_keys(keys: &[KeyDescription], shipped: &str) -> Value {
    let comments = comments_of_keys(shipped);
    let mut sections = Map::new();
    for described in keys {
        let name = described.key.replace("[0]", "");
        let Some((section, key)) = name.split_once('.') else {
            continue;
        };
        let comment = comments.get(&name).map_or("", String::as_str);
        let property = schema_of_key(described, comment);
        let section = sections
            .entry(section.to_owned())
            .or_insert_with(schema_of_table);
        match key.split_once('.') {
            None => section["properties"][key] = property,
            Some((table, key)) => {
                let tables = &mut section["properties"][table];
                if tables.is_null() {
                    *tables = json!({ "type": "array", "items": schema_of_table() });
                }
                tables["items"]["properties"][key] = property;
            }
        }
    }
    json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "The configuration of payrelay",
        "type": "object",
        "additionalProperties": false,
        "properties": sections,
    })
}

fn schema_of_table() -> Value {
    json!({ "type": "object", "additionalProperties": false, "properties": {} })
}

fn schema_of_key(described: &KeyDescription, comment: &str) -> Value {
    let kind = match &described.default {
        toml::Value::Integer(_) => "integer",
        toml::Value::Float(_) => "number",
        toml::Value::Boolean(_) => "boolean",
        toml::Value::Array(_) => "array",
        _ => "string",
    };
    let allowed = &described.allowed;
    let gap = if comment.is_empty() { "" } else { " " };
    let mut schema = json!({
        "type": kind,
        "description": format!("{comment}{gap}Allowed: {allowed}."),
    });
    if kind == "array" {
        schema["items"] = json!({ "type": "string" });
    }
    if described.display == Display::Shown {
        // Our own defaults are no dates and no infinite numbers.
        schema["default"] = serde_json::to_value(&described.default).unwrap_or_default();
    }
    if let Some(choices) = choices_of_text(allowed) {
        schema["enum"] = choices.into();
    }
    let range = allowed
        .split_once(" from ")
        .and_then(|(_, range)| range.split_once(" to "));
    if let Some((min, max)) = range.filter(|_| matches!(kind, "integer" | "number")) {
        for (name, text) in [("minimum", min), ("maximum", max)] {
            if let Ok(number) = serde_json::from_str::<Value>(text) {
                schema[name] = number;
            }
        }
    }
    schema
}

/// The words of `"a" or "b"`; `None` for any other text.
fn choices_of_text(allowed: &str) -> Option<Vec<&str>> {
    let words = allowed.split(" or ").map(|word| {
        let word = word.strip_prefix('"')?.strip_suffix('"')?;
        (!word.contains('"')).then_some(word)
    });
    words.collect()
}

/// The comment of each key of config.toml.
fn comments_of_keys(shipped: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut section = String::new();
    let mut comment: Vec<&str> = Vec::new();
    for line in shipped.lines() {
        let bare = line.trim_start_matches(['#', ' ']);
        let key = bare.split_once(" = ").filter(|(key, _)| {
            let is_name = |sign: char| sign.is_ascii_lowercase() || sign == '_';
            key.chars().all(is_name)
        });
        if bare.starts_with('[') && bare.ends_with(']') {
            bare.trim_matches(['[', ']']).clone_into(&mut section);
            comment.clear();
        } else if let Some((key, value)) = key {
            let remark = value.split_once(" # ").map(|(_, remark)| remark.trim());
            comment.extend(remark);
            found.insert(format!("{section}.{key}"), comment.join(" "));
            comment.clear();
        } else if line.starts_with('#') {
            comment.push(bare);
        } else {
            comment.clear();
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_list_of_quoted_words_is_a_choice() {
        let choice = choices_of_text("\"a\" or \"b\"");
        assert_eq!(choice, Some(vec!["a", "b"]));
        assert_eq!(choices_of_text("\"off\", or a path"), None);
        assert_eq!(choices_of_text("\"address:port\", such as \"a\""), None);
    }

    #[test]
    fn a_comment_belongs_to_the_key_below_it() {
        let comments =
            comments_of_keys("[a]\n# One.\n# Two.\nb = 1\nc = 2\n# [[a.d]]\n# e = 3 # E\n");
        let comment = |key: &str| comments[key].as_str();
        assert_eq!(
            (comment("a.b"), comment("a.c"), comment("a.d.e")),
            ("One. Two.", "", "E")
        );
    }
}
