//! What operators request of a channel: its notifier pauses or resumes it, or skips a payment.

use super::Notifier;
use crate::domain::reason::describe_reason;
use crate::domain::timestamp::Timestamp;
use crate::store::{StoreError, channel_action, delivery};

/// The outcome of a resume: what Slack answers is not known yet.
const RESUMED: &str =
    "resumed: the channel tries now; GET /admin/channels shows whether Slack accepts";

/// The outcome of a pause.
const PAUSED: &str = "paused: its payments wait until it is resumed";

impl Notifier {
    /// Executes the actions that operators requested since the last query.
    pub(super) fn execute_actions(&mut self) -> Result<(), StoreError> {
        let Some(mut last) = self.last_action else {
            return self.recall_actions();
        };
        let name = self.channel.name.clone();
        while let Some(requested) = self
            .queue
            .store
            .read(|connection| channel_action::next_channel_action(connection, &name, last))?
        {
            last = requested.id;
            // After a database error it is executed again.
            self.execute_action(requested)?;
            self.last_action = Some(last);
        }
        Ok(())
    }

    /// Actions requested before the start are over, except a pause without a resume.
    fn recall_actions(&mut self) -> Result<(), StoreError> {
        let name = self.channel.name.clone();
        let (last, pause) = self.queue.store.read(|connection| {
            let last = channel_action::last_channel_action(connection)?;
            Ok((last, channel_action::pause_in_effect(connection, &name)?))
        })?;
        if let Some(pause) = pause {
            let id = pause.id;
            self.queue
                .store
                .write(move |tx| channel_action::finish_channel_action(tx, id, PAUSED))?;
            self.hold(&pause.origin, pause.action.reason());
            log::warn!(
                event = "channel_stays_paused", channel = self.channel.name.as_str(),
                by = pause.origin.as_str();
                "channel {}: still paused by {}; payrelay channels resume {} ends it",
                self.channel.name,
                pause.origin,
                self.channel.name
            );
        }
        self.last_action = Some(last);
        Ok(())
    }

    fn hold(&mut self, origin: &str, reason: Option<&str>) {
        self.is_held = true;
        self.outage
            .held(&format!("by {origin}{}", describe_reason(reason)));
    }

    fn release(&mut self) {
        if std::mem::take(&mut self.is_held) {
            self.outage.released();
        }
        self.limiter.resume(self.now());
    }

    fn execute_action(
        &mut self,
        requested: channel_action::ChannelRequest,
    ) -> Result<(), StoreError> {
        let channel_action::ChannelRequest { id, action, origin } = requested;
        let name = self.channel.name.clone();
        let why = describe_reason(action.reason());
        let outcome = match action {
            channel_action::ChannelAction::Pause(reason) => {
                self.hold(&origin, reason.as_deref());
                self.queue
                    .store
                    .write(move |tx| channel_action::finish_channel_action(tx, id, PAUSED))?;
                PAUSED.to_owned()
            }
            channel_action::ChannelAction::Resume(_) => {
                self.release();
                self.queue
                    .store
                    .write(move |tx| channel_action::finish_channel_action(tx, id, RESUMED))?;
                RESUMED.to_owned()
            }
            channel_action::ChannelAction::Skip(_) if !self.outage.is_paused() => {
                let outcome = "nothing was skipped: the channel is not paused";
                self.queue
                    .store
                    .write(move |tx| channel_action::finish_channel_action(tx, id, outcome))?;
                outcome.to_owned()
            }
            channel_action::ChannelAction::Skip(reason) => {
                let reason = format!("skipped by {origin}: {reason}");
                let now = Timestamp::now();
                let skipped = self.queue.store.write(move |tx| {
                    let skipped = delivery::skip_oldest_delivery(tx, &name, &reason, now)?;
                    let outcome = match skipped {
                        Some(skipped) => format!(
                            "payment {} is dead letter {} now",
                            skipped.payment_id.unwrap_or_default(),
                            skipped.dead_letter_id
                        ),
                        None => "nothing was skipped: no payment waits".to_owned(),
                    };
                    channel_action::finish_channel_action(tx, id, &outcome)?;
                    Ok((skipped.is_some(), outcome))
                })?;
                let (is_skipped, outcome) = skipped;
                self.queue.metrics.dead(usize::from(is_skipped));
                self.limiter.resume(self.now());
                outcome
            }
        };
        log::info!(
            event = "channel_action", channel = self.channel.name.as_str(), by = origin.as_str();
            "channel {}: action of {origin}{why}: {outcome}",
            self.channel.name
        );
        Ok(())
    }
}
