//! The names of the values of small enums, as a command line or a file gives them.

/// Writes all values of an enum, the name of each, `Display` and `FromStr`.
macro_rules! names {
    ($type:ident, $field:literal: $($value:ident = $name:literal,)*) => {
        impl $type {
            /// Every value.
            pub const ALL: [$type; [$($name),*].len()] = [$($type::$value),*];

            /// Its name, which `FromStr` reads.
            pub const fn name(self) -> &'static str {
                match self {
                    $($type::$value => $name,)*
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.name())
            }
        }

        impl std::str::FromStr for $type {
            type Err = $crate::contract::error::Error;

            fn from_str(name: &str) -> Result<Self, $crate::contract::error::Error> {
                let found = Self::ALL.into_iter().find(|value| value.name() == name);
                found.ok_or_else(|| $crate::contract::error::Error::Name {
                    field: $field,
                    value: name.into(),
                    known: &[$($name),*],
                })
            }
        }
    };
}

pub(crate) use names;
