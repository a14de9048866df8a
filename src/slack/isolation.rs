//! The meaning of a rejected message, and the size and format of the next one. Pure: time is a
//! parameter, counted from any start.
//!
//! Every message has the same shape, so no payment is suspected of a rejection (400, 413, 422). A
//! rejected digest is sent again with fewer payments, and digests stay small for some time. A
//! rejected single message is sent once more as plain text, in case the channel does not accept
//! blocks. If that is rejected too, the reason is the channel or the template: the channel pauses,
//! and no payment is lost. Only an operator can skip a payment.

use std::time::Duration;

/// How long digests stay small after one was rejected.
pub const SMALL_FOR: Duration = Duration::from_mins(10);

/// After a rejection the next digest carries a quarter of the payments.
const SHRINK_FACTOR: usize = 4;

/// This number of consecutive messages without a response pauses the channel: each may appear
/// again.
const UNKNOWN_MAX: u32 = 3;

/// The format of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Block Kit, and `text` for notifications.
    Blocks,
    /// Plain text, without blocks.
    Plain,
}

/// The consequence of a rejection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The same payments again, fewer at a time.
    SendFewer,
    /// The same payment once more, as plain text.
    SendPlain,
    /// The channel pauses until an operator acts.
    Pause,
}

/// The state of a channel, from its last responses.
#[derive(Debug, Clone)]
pub struct Isolation {
    max: usize,
    size: usize,
    small_until: Option<Duration>,
    format: Format,
    unknown: u32,
}

impl Isolation {
    /// A channel whose messages may carry up to `max` payments.
    pub fn new(max: usize) -> Self {
        Self {
            max,
            size: max,
            small_until: None,
            format: Format::Blocks,
            unknown: 0,
        }
    }

    /// How many payments the next message may carry, at least one.
    pub fn size(&mut self, now: Duration) -> usize {
        if self.format == Format::Plain {
            return 1;
        }
        if self.small_until.is_some_and(|until| now >= until) {
            self.small_until = None;
            self.size = self.max;
        }
        self.size
    }

    /// Whether messages may have their full size: a summary is the largest.
    pub fn is_whole(&mut self, now: Duration) -> bool {
        self.size(now) == self.max && self.format == Format::Blocks
    }

    /// The format of the next message.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Records an accepted message.
    pub fn accepted(&mut self) {
        self.format = Format::Blocks;
        self.unknown = 0;
    }

    /// Records a rejected message with this number of payments.
    pub fn rejected(&mut self, payments: usize, now: Duration) -> Verdict {
        self.unknown = 0;
        if payments > 1 {
            self.size = (payments.min(self.size) / SHRINK_FACTOR).max(1);
            self.small_until = Some(now.saturating_add(SMALL_FOR));
            return Verdict::SendFewer;
        }
        match self.format {
            Format::Blocks => {
                self.format = Format::Plain;
                Verdict::SendPlain
            }
            // A probe of a paused channel is this single message again.
            Format::Plain => Verdict::Pause,
        }
    }

    /// Records a message without a response. Returns whether the channel has to pause.
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
    fn isolation_keeps_digests_small_for_ten_minutes() {
        let mut channel = Isolation::new(200);
        assert_eq!(channel.rejected(200, Duration::ZERO), Verdict::SendFewer);
        assert_eq!(channel.size(Duration::ZERO), 50);
        channel.accepted();
        assert_eq!(channel.size(SMALL_FOR / 2), 50);
        assert_eq!(channel.size(SMALL_FOR), 200);
    }

    #[test]
    fn isolation_sends_a_single_message_plain_once_and_then_pauses() {
        let mut channel = Isolation::new(200);
        assert_eq!(channel.rejected(1, Duration::ZERO), Verdict::SendPlain);
        assert_eq!(
            (channel.format(), channel.size(Duration::ZERO)),
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
            (channel.format(), channel.size(Duration::ZERO)),
            (Format::Blocks, 200)
        );
    }

    #[test]
    fn isolation_pauses_after_three_messages_without_a_response() {
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

    fn any_isolated_answer() -> impl Strategy<Value = Answer> {
        prop_oneof![
            Just(Answer::Accepted),
            Just(Answer::Rejected),
            Just(Answer::Unanswered)
        ]
    }

    proptest! {
        /// For any responses: a message carries between one payment and the maximum. Only a plain
        /// single message pauses. After a rejected digest none is larger for ten minutes. At most
        /// five consecutive rejections precede the pause.
        #[test]
        fn isolation_pauses_a_channel_that_rejects_everything_soon(
            answers in proptest::collection::vec((any_isolated_answer(), 0_u64..400), 1..100),
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
                        let form = channel.format();
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
            while channel.format() == Format::Blocks || rejections == 0 {
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
