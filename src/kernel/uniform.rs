//! Uniforms: what a dispatch tells its kernel beside the buffers. Each kernel declares in its module which parameters it reads, made of
//! the blocks of `params.rs` and of fields of its own. The WGSL struct is written from the same declaration.
//!
//! In WGSL all fields stand side by side. WGSL aligns a struct within a uniform to 16 bytes, so that blocks as structs would need
//! padding on the host. A block of which a kernel may have several puts its name before those of its fields: `q_base`.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Index;

use super::params::{FLAGS, Place};

/// A field as WGSL has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The name.
    pub name: String,
    /// The type: `u32` or `f32`.
    pub kind: &'static str,
}

/// A number, or fields that belong together. All are words, so that Rust and WGSL put each at the same offset.
pub trait Block: bytemuck::Pod {
    /// The flags that a shader reads where it has these fields.
    const READS: u32;

    /// Adds the fields to a list. The block is a field of that name.
    fn list(name: &str, members: &mut Vec<Member>);
}

impl Block for u32 {
    const READS: u32 = 0;

    fn list(name: &str, members: &mut Vec<Member>) {
        members.push(Member { name: name.into(), kind: "u32" });
    }
}

impl Block for f32 {
    const READS: u32 = 0;

    fn list(name: &str, members: &mut Vec<Member>) {
        members.push(Member { name: name.into(), kind: "f32" });
    }
}

/// All parameters of a kernel.
pub trait Parameters: Block {
    /// What WGSL calls them.
    fn layout() -> &'static Layout;
}

/// A kernel and the parameters that it reads.
pub(crate) trait Reads {
    type Params: Parameters;

    /// What WGSL calls the parameters.
    fn layout(&self) -> &'static Layout {
        Self::Params::layout()
    }
}

/// The fields and flags of a kernel's uniform.
#[derive(Debug, PartialEq, Eq)]
pub struct Layout {
    /// The fields, each of 4 bytes.
    pub members: Vec<Member>,
    reads: u32,
}

impl Layout {
    pub(crate) fn of<P: Parameters>() -> Self {
        let mut members = Vec::new();
        P::list("", &mut members);
        assert_eq!(4 * members.len(), size_of::<P>(), "every word of a uniform has a name");
        Layout { members, reads: P::READS }
    }

    /// Which of its words a field is.
    fn place(&self, name: &str) -> Option<usize> {
        self.members.iter().position(|member| member.name == name)
    }

    /// The fields as WGSL struct members.
    pub(crate) fn wgsl(&self) -> String {
        self.members.iter().map(|Member { name, kind }| format!("    {name}: {kind},\n")).collect()
    }

    /// Names and values of the flags that the kernel reads.
    pub(crate) fn flags(&self) -> BTreeMap<&'static str, u32> {
        FLAGS.iter().copied().filter(|(_, flag)| self.reads & flag != 0).collect()
    }
}

/// The uniform of one dispatch of any kernel.
#[derive(Clone, PartialEq)]
pub struct Uniform {
    layout: &'static Layout,
    words: Vec<u32>,
}

impl Uniform {
    pub(crate) fn new<P: Parameters>(params: &P) -> Self {
        Uniform { layout: P::layout(), words: bytemuck::cast_slice(bytemuck::bytes_of(params)).to_vec() }
    }

    /// Its fields.
    pub fn layout(&self) -> &'static Layout {
        self.layout
    }

    /// The part of the work. It is what every uniform begins with.
    pub fn place(&self) -> Place {
        *bytemuck::from_bytes(&self.bytes()[..size_of::<Place>()])
    }

    /// The same for the workgroups `first..end` of the part.
    pub(crate) fn cut(&self, first: u32, end: u32) -> Self {
        let mut uniform = self.clone();
        let place = Place { first, end, ..self.place() };
        uniform.words[..size_of::<Place>() / 4].copy_from_slice(bytemuck::cast_slice(bytemuck::bytes_of(&place)));
        uniform
    }

    /// Clears the flags that are not in `keep`.
    pub(crate) fn keep_flags(&mut self, keep: u32) {
        let place = self.layout.place("flags").expect("a kernel without flags has none to clear");
        self.words[place] &= keep;
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }

    /// The bits of a field, `None` where the kernel does not read it.
    pub fn get(&self, name: &str) -> Option<u32> {
        self.layout.place(name).map(|place| self.words[place])
    }

    /// Whether a flag is set that the kernel reads.
    pub fn has(&self, flag: &str) -> bool {
        self.layout.flags().get(flag).is_some_and(|flag| self["flags"] & flag != 0)
    }
}

/// The bits of a field that the kernel must have.
impl Index<&str> for Uniform {
    type Output = u32;

    fn index(&self, name: &str) -> &u32 {
        let place = self.layout.place(name).unwrap_or_else(|| panic!("the kernel does not read {name}"));
        &self.words[place]
    }
}

impl fmt::Debug for Uniform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.layout.members.iter().map(|member| &member.name);
        f.debug_map().entries(names.zip(&self.words)).finish()
    }
}

/// Declares a block: `named` where a kernel may have several of its kind, else `plain`. `reads` names the flags that come with it.
macro_rules! block {
    ($(#[$doc:meta])* $naming:ident $block:ident {
        $($(#[$field_doc:meta])* $field:ident: $kind:ty,)*
    } $(reads $($flag:ident),*)?) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
        pub struct $block { $($(#[$field_doc])* pub $field: $kind,)* }

        impl $crate::kernel::uniform::Block for $block {
            const READS: u32 = 0
                $($(| $crate::kernel::params::flags::$flag)*)?
                $(| <$kind as $crate::kernel::uniform::Block>::READS)*;

            fn list(name: &str, members: &mut Vec<$crate::kernel::uniform::Member>) {
                let of = |field| $crate::kernel::uniform::$naming(name, field);
                $(<$kind as $crate::kernel::uniform::Block>::list(&of(stringify!($field)), members);)*
            }
        }
    };
}

/// Declares the parameters of a kernel. The first is the part of the work; with `of attention` the kernel is one of those that
/// share what the planner knows.
macro_rules! params {
    ($(#[$doc:meta])* $kernel:ident of attention {
        $($(#[$field_doc:meta])* $field:ident: $kind:ty,)*
    } $(reads $($flag:ident),*)?) => {
        $crate::kernel::uniform::params! {
            $(#[$doc])* $kernel { $($(#[$field_doc])* $field: $kind,)* } $(reads $($flag),*)?
        }

        impl From<&$crate::kernel::params::Attention> for Params {
            fn from(all: &$crate::kernel::params::Attention) -> Self {
                Params { place: all.place, $($field: all.$field,)* }
            }
        }

        impl $crate::kernel::attention::Picks for $kernel {
            fn pick(&self, all: &$crate::kernel::params::Attention) -> $crate::kernel::uniform::Uniform {
                $crate::kernel::uniform::Uniform::new(&Params::from(all))
            }
        }
    };
    ($(#[$doc:meta])* $kernel:ident {
        $($(#[$field_doc:meta])* $field:ident: $kind:ty,)*
    } $(reads $($flag:ident),*)?) => {
        $crate::kernel::uniform::block! {
            $(#[$doc])*
            plain Params {
                /// The part of the work.
                place: $crate::kernel::params::Place,
                $($(#[$field_doc])* $field: $kind,)*
            } $(reads $($flag),*)?
        }

        const _: () = assert!(size_of::<Params>() as u64 <= $crate::contract::caps::UNIFORM_STRIDE);

        impl $crate::kernel::uniform::Parameters for Params {
            fn layout() -> &'static $crate::kernel::uniform::Layout {
                use std::sync::LazyLock;

                use $crate::kernel::uniform::Layout;

                static LAYOUT: LazyLock<Layout> = LazyLock::new(Layout::of::<Params>);
                &LAYOUT
            }
        }

        impl $crate::kernel::uniform::Reads for $kernel {
            type Params = Params;
        }
    };
}

pub(crate) use {block, params};

/// The name of a field of a block that has a name of its own.
pub(crate) fn named(block: &str, field: &str) -> String {
    format!("{block}_{field}")
}

/// The name of a field of a block of which a kernel has one.
pub(crate) fn plain(_: &str, field: &str) -> String {
    field.into()
}
