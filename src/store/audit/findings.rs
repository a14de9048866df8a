//! Runs the queries of an audit, and collects their findings.

use rusqlite::{ErrorCode, Params, Row, Transaction};
use serde::Serialize;

use super::checks::Check;
use crate::store::StoreError;

/// A kind of inconsistency or note, with its count and examples.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its name, a contract.
    pub kind: &'static str,
    /// Its description.
    pub what: &'static str,
    /// The number of cases.
    pub count: i64,
    /// The first cases.
    pub examples: Vec<String>,
}

/// The kind of finding of a damaged file.
pub const DAMAGED_KIND: &str = "damaged";
const DAMAGED_FILE: &str = "places where the file is damaged";

/// The findings in one snapshot.
pub(super) struct Findings<'a> {
    tx: &'a Transaction<'a>,
    limit: usize,
    pub(super) found: Vec<Finding>,
}

impl<'a> Findings<'a> {
    pub(super) fn new(tx: &'a Transaction<'a>, limit: usize) -> Self {
        Self {
            tx,
            limit,
            found: Vec::new(),
        }
    }

    pub(super) fn run_check(
        &mut self,
        check: &Check,
        params: impl Params,
    ) -> Result<(), StoreError> {
        self.collect(check.kind, check.what, check.sql, params, |row| {
            row.get(0).map(Some)
        })
    }

    /// Also rows that an index lacks: they would never be published or delivered
    /// (<https://sqlite.org/pragma.html#pragma_integrity_check>).
    pub(super) fn check_integrity(&mut self) -> Result<(), StoreError> {
        self.collect(
            DAMAGED_KIND,
            DAMAGED_FILE,
            "PRAGMA main.integrity_check",
            [],
            |row| Ok(Some(row.get(0)?).filter(|line: &String| line != "ok")),
        )
    }

    /// Tables with a check of their own are left out.
    pub(super) fn check_foreign_keys(&mut self) -> Result<(), StoreError> {
        let sql = "SELECT \"table\", rowid, parent FROM pragma_foreign_key_check \
                   WHERE \"table\" NOT IN ('delivery', 'idempotency_key')";
        self.collect(
            "foreign-key",
            "rows that refer to a missing row",
            sql,
            [],
            |row| {
                let (table, rowid, parent): (String, Option<i64>, String) =
                    (row.get(0)?, row.get(1)?, row.get(2)?);
                Ok(Some(format!(
                    "{table} {}, {parent}",
                    rowid.unwrap_or_default()
                )))
            },
        )
    }

    /// The one finding of damage, whichever check has found it.
    fn damage_finding(&mut self) -> &mut Finding {
        let known = self
            .found
            .iter()
            .position(|finding| finding.kind == DAMAGED_KIND);
        let at = known.unwrap_or_else(|| {
            self.found.push(Finding {
                kind: DAMAGED_KIND,
                what: DAMAGED_FILE,
                count: 0,
                examples: Vec::new(),
            });
            self.found.len() - 1
        });
        &mut self.found[at]
    }

    /// Counts the rows that are findings, and keeps the first as examples.
    fn collect(
        &mut self,
        kind: &'static str,
        what: &'static str,
        sql: &str,
        params: impl Params,
        show: impl Fn(&Row<'_>) -> rusqlite::Result<Option<String>>,
    ) -> Result<(), StoreError> {
        let mut finding = Finding {
            kind,
            what,
            count: 0,
            examples: Vec::new(),
        };
        let collected = self.tx.prepare(sql).and_then(|mut statement| {
            let mut rows = statement.query(params)?;
            while let Some(row) = rows.next()? {
                let Some(example) = show(row)? else { continue };
                finding.count += 1;
                if finding.examples.len() < self.limit {
                    finding.examples.push(example);
                }
            }
            Ok(())
        });
        if finding.count > 0 {
            self.found.push(finding);
        }
        match collected {
            // A damaged page ends this query, and is a finding of its own.
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseCorrupt) => {
                let limit = self.limit;
                let damaged = self.damage_finding();
                damaged.count += 1;
                if damaged.examples.len() < limit {
                    damaged
                        .examples
                        .push(format!("looking for {what}: {error}"));
                }
                Ok(())
            }
            collected => Ok(collected?),
        }
    }
}
