//! The parameters of paths and queries, parsed.

use std::collections::HashSet;

use super::problem::Problem;

/// The default number of entries of a page.
pub(super) const PAGE: usize = 50;

/// The largest page.
pub(super) const PAGE_MAX: usize = 500;

/// A path with something else than an id names no resource.
pub(super) fn parse_path_param(path: &str, text: &str) -> Result<i64, Problem> {
    parse_id_param("id", text)
        .map_err(|_| Problem::not_found(format!("there is no resource at {path}")))
}

pub(super) fn reject_params(query: &str) -> Result<(), Problem> {
    match query_params(query).next() {
        None => Ok(()),
        Some((name, _)) => Err(Problem::invalid_field(
            name,
            "there is no such parameter; there are none here",
        )),
    }
}

pub(super) fn parse_id_param(field: &str, text: &str) -> Result<i64, Problem> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let refused =
        || Problem::invalid_field(field, "must be an integer from 0 to 9223372036854775807");
    if digits {
        text.parse().map_err(|_| refused())
    } else {
        Err(refused())
    }
}

/// The names and values of a query; none of them needs decoding.
pub(super) fn query_params(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

/// Refuses a parameter that is given twice: it is ambiguous.
pub(super) fn reject_duplicate_params(query: Option<&str>) -> Result<&str, Problem> {
    let query = query.unwrap_or("");
    let mut seen = HashSet::new();
    match query_params(query).find(|(name, _)| !seen.insert(*name)) {
        Some((name, _)) => Err(Problem::invalid_field(name, "is given twice")),
        None => Ok(query),
    }
}

pub(super) fn parse_page_size_param(text: &str) -> Result<usize, Problem> {
    let limit = usize::try_from(parse_id_param("limit", text)?).unwrap_or(usize::MAX);
    if (1..=PAGE_MAX).contains(&limit) {
        Ok(limit)
    } else {
        Err(Problem::invalid_field(
            "limit",
            format!("must be an integer from 1 to {PAGE_MAX}"),
        ))
    }
}

/// The entry before which a page begins, and its size.
pub(super) fn parse_page_params(query: &str) -> Result<(Option<i64>, usize), Problem> {
    let mut before = None;
    let mut limit = PAGE;
    for (name, value) in query_params(query) {
        match name {
            "before" => before = Some(parse_id_param("before", value)?),
            "limit" => limit = parse_page_size_param(value)?,
            _ => {
                return Err(Problem::invalid_field(
                    name,
                    "there is no such parameter; there are before and limit",
                ));
            }
        }
    }
    Ok((before, limit))
}

pub(super) fn parse_bool_param(name: &str, value: &str) -> Result<bool, Problem> {
    match value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(Problem::invalid_field(name, "must be true or false")),
    }
}
