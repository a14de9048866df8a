//! Enums of which each value has a text: as it is stored, shown and configured. Pure.

/// Defines an enum, the text of each value, and, if it is public, the reverse. It is serialized as
/// its text.
macro_rules! text_enum {
    (
        $(#[$enum_attribute:meta])*
        pub enum $name:ident { $($body:tt)+ }
    ) => {
        text_enum! {
            $(#[$enum_attribute])*
            pub(self) pub enum $name { $($body)+ }
        }

        impl $name {
            /// The value with this text.
            pub fn parse(text: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|value| value.as_str() == text)
            }
        }
    };
    (
        $(#[$enum_attribute:meta])*
        pub(self) $visibility:vis enum $name:ident {
            $($(#[$value_attribute:meta])* $value:ident = $text:literal,)+
        }
    ) => {
        $(#[$enum_attribute])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        $visibility enum $name {
            $($(#[$value_attribute])* $value,)+
        }

        impl $name {
            /// Every value, in the order of their definition.
            $visibility const ALL: &[Self] = &[$(Self::$value,)+];

            /// The text of this value.
            $visibility const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$value => $text,)+
                }
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
    };
    (
        $(#[$enum_attribute:meta])*
        pub(super) enum $name:ident { $($body:tt)+ }
    ) => {
        text_enum! {
            $(#[$enum_attribute])*
            pub(self) pub(super) enum $name { $($body)+ }
        }
    };
}

pub(crate) use text_enum;
