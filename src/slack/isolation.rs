//! What a rejected message means, and how the next one looks. Pure: time is a parameter, counted
//! from any beginning.
//!
//! Every message has the same shape, so a payment is not the suspect of a rejection (400, 413,
//! 422). A digest that is rejected is sent smaller, and not larger again for some time. A single
//! message that is rejected is sent once more as plain text, in case the channel does not take
//! blocks. If that is rejected too, the channel or the template is at fault: the channel pauses,
//! and no payment is lost. Only an operator can skip one.

use std::time::Duration;

/// How long digests stay small after one was rejected.
pub const SMALL_FOR: Duration = Duration::from_mins(10);

/// A digest that was rejected shrinks to a quarter.
const SHRINK_FACTOR: usize = 4;

/// So many messages in a row without an answer pause the channel: each may show again.
const UNKNOWN_MAX: u32 = 3;

/// How a message is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// With Block Kit, and `text` for notifications.
    Blocks,
    /// `text` alone.
    Plain,
}

/// What follows a rejection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The same payments again, fewer at a time.
    SendFewer,
    /// The same payment once more, as plain text.
    SendPlain,
    /// The channel takes nothing until an operator acts.
    Pause,
}

/// What is known of a channel from its last answers.
#[derive(Debug, Clone)]
pub struct Isolation {
    max: usize,
    size: usize,
    small_until: Option<Duration>,
    form: Format,
    unknown: u32,
}

impl Isolation {
    /// A channel that takes up to `max` payments in a message.
    pub fn new(max: usize) -> Self {
        Self {
            max,
            size: max,
            small_until: None,
            form: Format::Blocks,
            unknown: 0,
        }
    }

    /// How many payments the next message may carry, at least one.
    pub fn size(&mut self, now: Duration) -> usize {
        if self.form == Format::Plain {
            return 1;
        }
        if self.small_until.is_some_and(|until| now >= until) {
            self.small_until = None;
            self.size = self.max;
        }
        self.size
    }

    /// Whether every message is as large as it may be: a summary is the largest.
    pub fn is_whole(&mut self, now: Duration) -> bool {
        self.size(now) == self.max && self.form == Format::Blocks
    }

    /// How the next message is written.
    pub fn form(&self) -> Format {
        self.form
    }

    /// A message was accepted.
    pub fn accepted(&mut self) {
        self.form = Format::Blocks;
        self.unknown = 0;
    }

    /// A message with so many payments was rejected.
    pub fn rejected(&mut self, payments: usize, now: Duration) -> Verdict {
        self.unknown = 0;
        if payments > 1 {
            self.size = (payments.min(self.size) / SHRINK_FACTOR).max(1);
            self.small_until = Some(now.saturating_add(SMALL_FOR));
            return Verdict::SendFewer;
        }
        match self.form {
            Format::Blocks => {
                self.form = Format::Plain;
                Verdict::SendPlain
            }
            // A probe of a paused channel is this one message again.
            Format::Plain => Verdict::Pause,
        }
    }

    /// A message got no answer; true if the channel has to pause.
    pub fn unanswered(&mut self) -> bool {
        self.unknown += 1;
        self.unknown >= UNKNOWN_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_digest_shrinks_and_stays_small_for_ten_minutes() {
        let mut channel = Isolation::new(200);
        assert_eq!(channel.rejected(200, Duration::ZERO), Verdict::SendFewer);
        assert_eq!(channel.size(Duration::ZERO), 50);
        channel.accepted();
        assert_eq!(channel.size(SMALL_FOR / 2), 50);
        assert_eq!(channel.size(SMALL_FOR), 200);
    }

    #[test]
    fn a_single_message_is_sent_plain_once_and_then_the_channel_pauses() {
        let mut channel = Isolation::new(200);
        assert_eq!(channel.rejected(1, Duration::ZERO), Verdict::SendPlain);
        assert_eq!(
            (channel.form(), channel.size(Duration::ZERO)),
            (Format::Plain, 1)
        );
        assert_eq!(channel.rejected(1, Duration::ZERO), Verdict::Pause);
        assert_eq!(
            channel.rejected(1, Duration::ZERO),
            Verdict::Pause,
            "a probe is one message"
        );
        channel.accepted();
        assert_eq!(
            (channel.form(), channel.size(Duration::ZERO)),
            (Format::Blocks, 200)
        );
    }

    #[test]
    fn three_messages_without_an_answer_pause_the_channel() {
        let mut channel = Isolation::new(200);
        assert!(!channel.unanswered() && !channel.unanswered());
        channel.accepted();
        assert!(!channel.unanswered() && !channel.unanswered() && channel.unanswered());
    }

    #[derive(Debug, Clone)]
    enum Answer {
        Accepted,
        Rejected,
        Unanswered,
    }

    proptest! {
        /// Whatever is answered: a message carries between one payment and the maximum; only a
        /// plain single message pauses; after any digest was rejected none is larger for ten
        /// minutes; and of n rejections in a row at most five go by before the channel pauses.
        #[test]
        fn a_channel_that_rejects_everything_pauses_soon_and_sends_one_payment_a_probe(
            answers in proptest::collection::vec(
                (prop_oneof![Just(Answer::Accepted), Just(Answer::Rejected), Just(Answer::Unanswered)], 0_u64..400),
                1..100,
            ),
            max in 1_usize..500,
        ) {
            let mut channel = Isolation::new(max);
            let mut now = Duration::ZERO;
            let mut limit: Option<(usize, Duration)> = None;
            for (answer, seconds) in answers {
                now += Duration::from_secs(seconds);
                let size = channel.size(now);
                prop_assert!((1..=max).contains(&size));
                if let Some((small, until)) = limit && now < until {
                    prop_assert!(size <= small);
                }
                match answer {
                    Answer::Accepted => channel.accepted(),
                    Answer::Unanswered => drop(channel.unanswered()),
                    Answer::Rejected => {
                        let form = channel.form();
                        match channel.rejected(size, now) {
                            Verdict::SendFewer => {
                                prop_assert!(size > 1);
                                limit = Some((channel.size(now), now + SMALL_FOR));
                            }
                            Verdict::SendPlain => prop_assert!(size == 1 && form == Format::Blocks),
                            Verdict::Pause => prop_assert!(size == 1 && form == Format::Plain),
                        }
                    }
                }
            }
            let mut rejections = 0;
            while channel.form() == Format::Blocks || rejections == 0 {
                let size = channel.size(now);
                let verdict = channel.rejected(size, now);
                rejections += 1;
                if verdict == Verdict::Pause {
                    break;
                }
            }
            prop_assert!(rejections <= 6, "{}", rejections);
        }
    }
}
