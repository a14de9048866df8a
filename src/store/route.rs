//! The channels' routes, as the delivery table's insert reads them.

use rusqlite::Transaction;

use super::delivery::CHANNEL;
use crate::config;

/// Replaces the routes by those of the configuration. What waits for a channel that is no more is routed anew.
pub fn replace(tx: &Transaction<'_>, routes: &[config::Route]) -> rusqlite::Result<()> {
    tx.execute("DELETE FROM route", [])?;
    let mut insert = tx.prepare_cached("INSERT INTO route VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?;
    for (position, route) in (0_i64..).zip(routes) {
        let status = route.status.map(super::payment::status_text);
        let (amount, user) = (&route.amount, &route.user);
        insert.execute((position, &route.name, status, amount.start(), amount.end(), user.start(), user.end()))?;
    }
    let moved: Vec<i64> = tx
        .prepare(
            // The dead may be replayed.
            "SELECT outbox_id FROM delivery WHERE status IN ('PENDING', 'SENDING') \
             AND channel <> 'default' AND channel NOT IN (SELECT channel FROM route) \
             UNION SELECT l.outbox_id FROM dead_letter l JOIN delivery d ON d.outbox_id = l.outbox_id \
             WHERE l.state = 'OPEN' AND d.channel <> 'default' AND d.channel NOT IN (SELECT channel FROM route)",
        )?
        .query_map([], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let mut reroute = tx.prepare(&format!("UPDATE delivery SET channel = {CHANNEL} WHERE outbox_id = ?1"))?;
    for id in moved {
        reroute.execute([id])?;
    }
    Ok(())
}
