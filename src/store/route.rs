//! The channels' routes, as the delivery table's insert reads them.

use rusqlite::Transaction;

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
            "SELECT outbox_id FROM delivery WHERE status IN ('PENDING', 'SENDING') \
             AND channel <> 'default' AND channel NOT IN (SELECT channel FROM route)",
        )?
        .query_map([], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let mut reroute = tx.prepare_cached(
        "UPDATE delivery SET channel = ifnull((\
             SELECT r.channel FROM outbox o CROSS JOIN payment p CROSS JOIN route r \
             WHERE o.id = ?1 AND p.id = o.payment_id AND (r.status IS NULL OR r.status = p.status) \
             AND p.amount BETWEEN r.amount_min AND r.amount_max AND p.user_id BETWEEN r.user_min AND r.user_max \
             ORDER BY r.position LIMIT 1\
         ), 'default') WHERE outbox_id = ?1",
    )?;
    for id in moved {
        reroute.execute([id])?;
    }
    Ok(())
}
