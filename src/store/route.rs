//! The channels' routes, as the insert of a delivery reads them.

use super::delivery::channel_of;
use crate::config;
use rusqlite::Transaction;

/// Replaces the routes by those of the configuration. Deliveries of a removed channel are routed
/// again.
pub fn replace_routes(tx: &Transaction<'_>, routes: &[config::Route]) -> rusqlite::Result<()> {
    tx.execute("DELETE FROM route", [])?;
    let mut insert = tx.prepare_cached("INSERT INTO route VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?;
    for (position, route) in (0_i64..).zip(routes) {
        let amount = &route.amount;
        let user = &route.user;
        insert.execute((
            position,
            &route.name,
            route.status,
            amount.start(),
            amount.end(),
            user.start(),
            user.end(),
        ))?;
    }
    let gone = "channel <> 'default' AND channel NOT IN (SELECT channel FROM route)";
    let waiting =
        format!("SELECT outbox_id FROM delivery WHERE status IN ('PENDING', 'SENDING') AND {gone}");
    // Dead deliveries may be replayed. CROSS JOIN keeps SQLite from reading the whole delivery
    // table for a few letters.
    let dead = format!(
        "SELECT d.outbox_id FROM dead_letter l CROSS JOIN delivery d \
         WHERE l.state = 'OPEN' AND d.outbox_id = l.outbox_id AND {gone}"
    );
    let mut moved = Vec::new();
    for sql in [waiting, dead] {
        let mut find = tx.prepare(&sql)?;
        let found = find.query_map([], |row| row.get::<_, i64>(0))?;
        moved.extend(found.collect::<rusqlite::Result<Vec<_>>>()?);
    }
    let mut reroute = tx.prepare(concat!(
        "UPDATE delivery SET channel = ",
        channel_of!("?1"),
        " WHERE outbox_id = ?1"
    ))?;
    for id in moved {
        reroute.execute([id])?;
    }
    Ok(())
}
