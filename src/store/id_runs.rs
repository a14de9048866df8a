//! Runs of consecutive ids. One statement over a range changes all rows of a run, in about half the
//! time of a statement for each row (`benches/whole_way.rs`).

use std::ops::RangeInclusive;

/// The runs of ids that rise by one, in their order.
pub(super) fn id_runs(ids: &[i64]) -> impl Iterator<Item = RangeInclusive<i64>> {
    ids.chunk_by(|one, next| one.checked_add(1) == Some(*next))
        .filter_map(|run| Some(*run.first()?..=*run.last()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_rise_by_one_are_a_run() {
        let runs = |ids: &[i64]| id_runs(ids).collect::<Vec<_>>();
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[7]), [7..=7]);
        assert_eq!(runs(&[1, 2, 3, 5, 6, 4, 4]), [1..=3, 5..=6, 4..=4, 4..=4]);
        assert_eq!(
            runs(&[i64::MAX, i64::MIN]),
            [i64::MAX..=i64::MAX, i64::MIN..=i64::MIN]
        );
    }
}
