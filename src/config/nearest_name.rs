//! The name that was probably meant by a misspelt one. Pure.

/// How many letters may be wrong, missing or too many.
const TYPOS_MAX: usize = 2;

/// The known name that is nearly the same; `None`: there is none.
pub(super) fn nearest_name<'a>(
    name: &str,
    known: impl Iterator<Item = &'a str>,
) -> Option<&'a str> {
    let lower_case = name.to_lowercase();
    let nearest = known
        .map(|known| (edit_distance(&lower_case, &known.to_lowercase()), known))
        .min()?;
    (nearest.0 <= TYPOS_MAX).then_some(nearest.1)
}

/// How many letters have to be inserted, removed or replaced (Levenshtein).
fn edit_distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.chars().count()).collect();
    for (line, from) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = line + 1;
        for (column, to) in to.chars().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row.last().copied().unwrap_or_default()
}
