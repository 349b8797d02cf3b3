//! The one error type of the crate.

use crate::contract::obstacle::Obstacle;
use crate::contract::operands::Scalar;
use crate::contract::problem::Element;

/// Shorthand for a result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. Each message names the field, its value and the limit. Where the name does not tell what can be done
/// about it, the message says so.
///
/// A *field* below is the name of what is wrong, as the message prints it: a field of [`crate::Problem`] or of another description, an
/// operand, or a short phrase such as `batch·heads`.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A size that must be at least 1 is 0. Set it.
    #[error("{field} is 0; it must be at least 1")]
    Zero {
        /// The size.
        field: &'static str,
    },
    /// A number that the caller gives is larger than the crate or the device can address.
    #[error("{field} is {value}; the limit is {limit}")]
    TooLarge {
        /// The number.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The largest value that works.
        limit: u64,
    },
    /// A tensor or a plan takes more than the crate or the device can hold, bind or run.
    #[error("{field} takes {size} {unit}; the limit is {limit} {unit}: {advice}")]
    Room {
        /// The tensor or the plan.
        field: &'static str,
        /// The room that it takes, in `unit`.
        size: u64,
        /// The unit of `size` and `limit`: bytes, elements, dispatches, …
        unit: &'static str,
        /// The most that works.
        limit: u64,
        /// What the caller can do to need less.
        advice: &'static str,
    },
    /// Query heads must be a whole multiple of key/value heads.
    #[error("heads is {heads} and kv_heads is {kv_heads}; kv_heads must divide heads")]
    KvHeads {
        /// Query heads.
        heads: u32,
        /// Key/value heads.
        kv_heads: u32,
    },
    /// One size must divide another.
    #[error("{field} is {value}; it must divide {of}, which is {whole}")]
    Divide {
        /// The divisor.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it must divide.
        of: &'static str,
        /// The value of what must be divided.
        whole: u64,
    },
    /// A size of the problem or of an input differs from the layer's.
    #[error("{field} is {got}; the layer needs {want}")]
    LayerSize {
        /// The size.
        field: &'static str,
        /// Its value.
        got: u32,
        /// The value that the layer needs.
        want: u32,
    },
    /// A size or stride must be a multiple of a small number.
    #[error("{field} is {value}; it must be a multiple of {of}")]
    Multiple {
        /// The size or stride.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The number that must divide it.
        of: u64,
    },
    /// A number that must be finite (and, for `softcap`, positive) is not.
    #[error("{field} is {value}; it must be {want}")]
    Number {
        /// The number.
        field: &'static str,
        /// Its value.
        value: f32,
        /// What is accepted.
        want: &'static str,
    },
    /// A text is not the name of any value.
    #[error("{field} is {value:?}; it must be one of {}", known.join(", "))]
    Name {
        /// What is named, such as `kernel`.
        field: &'static str,
        /// The text.
        value: String,
        /// The names that are known.
        known: &'static [&'static str],
    },
    /// An operand's shape does not broadcast to [batch, heads, seq_q, seq_kv].
    #[error(
        "{field} has shape {shape:?}, which does not broadcast to [batch, heads, seq_q, seq_kv] = {target:?} \
         (each axis is 1 or full; the last one may be shorter than seq_kv, but not 0)"
    )]
    Broadcast {
        /// `mask` or `bias`.
        field: &'static str,
        /// Its shape, right-aligned.
        shape: [u32; 4],
        /// The shape of the score matrix.
        target: [u32; 4],
    },
    /// An operand has a rank outside 1 to 4.
    #[error("{field} has rank {rank}; the ranks 1 to 4 broadcast to [batch, heads, seq_q, seq_kv]")]
    Rank {
        /// `mask` or `bias`.
        field: &'static str,
        /// Its rank.
        rank: usize,
    },
    /// With these strides two elements of an output have the same address.
    #[error("{field} has strides of {strides:?} elements (batch, head, row), which overlap for the sizes {sizes:?}")]
    Overlap {
        /// The output.
        field: &'static str,
        /// Strides of batch, head and row in elements.
        strides: [u64; 3],
        /// Sizes of batch, head, row and last axis.
        sizes: [u32; 4],
    },
    /// Two options exclude each other.
    #[error("{left} and {right} exclude each other: {why}")]
    Conflict {
        /// One side.
        left: &'static str,
        /// The other.
        right: &'static str,
        /// The reason.
        why: &'static str,
    },
    /// A plan that is read was made by another version of this crate, which planned the same problem in another way, or was changed.
    #[error(
        "the stored plan runs {stored:?}; this version of wgpu-attention makes another plan of its problem, with {made:?}: plan it anew"
    )]
    StoredPlan {
        /// The kernels of the stored plan.
        stored: String,
        /// The kernels of the plan that is made now.
        made: String,
    },
    /// A host slice has the wrong number of elements.
    #[error("{field} has {got} elements; the problem needs {want}")]
    Length {
        /// The operand.
        field: &'static str,
        /// Elements given.
        got: usize,
        /// Elements needed.
        want: usize,
    },
    /// The problem needs an operand that was not given.
    #[error("the problem needs {field}, which was not given")]
    Missing {
        /// The operand.
        field: &'static str,
    },
    /// An operand was given that the problem does not use.
    #[error("{field} was given, but the problem does not use it")]
    Unexpected {
        /// The operand.
        field: &'static str,
    },
    /// An operand has another element type than the problem says.
    #[error("{field} holds {got}; the problem says {want}")]
    Element {
        /// The operand.
        field: &'static str,
        /// Type given.
        got: Element,
        /// Type needed.
        want: Element,
    },
    /// An operand holds numbers of another kind than it must: integers where it takes floating-point numbers, say.
    #[error("{field} holds {got}; it must hold {want}")]
    Scalar {
        /// The operand.
        field: &'static str,
        /// Type given.
        got: Scalar,
        /// Type needed.
        want: Scalar,
    },
    /// An entry of a small array (a length, a boundary, a page number) is out of range.
    #[error("{field}[{index}] is {value}; it must be {want} {limit}")]
    Entry {
        /// `key_lengths`, `cu_seqlens_q`, …
        field: &'static str,
        /// Index of the entry.
        index: usize,
        /// Its value.
        value: i64,
        /// `at most` or `at least`.
        want: &'static str,
        /// The bound.
        limit: i64,
    },
    /// A buffer slice is shorter than the problem needs.
    #[error("buffer {field} has {got} bytes; the problem needs {want}")]
    BufferSize {
        /// The operand.
        field: &'static str,
        /// Bytes given.
        got: u64,
        /// Bytes needed.
        want: u64,
    },
    /// A buffer was created without a usage that the call needs.
    #[error("buffer {field} lacks the usage {usage}")]
    BufferUsage {
        /// The operand.
        field: &'static str,
        /// The missing usage.
        usage: &'static str,
    },
    /// A buffer slice begins at an offset that the device cannot bind.
    #[error("buffer {field} begins at byte {offset}, which is not a multiple of {alignment}")]
    BufferOffset {
        /// The operand.
        field: &'static str,
        /// Its offset.
        offset: u64,
        /// The device's `min_storage_buffer_offset_alignment`.
        alignment: u64,
    },
    /// An output uses the same buffer as another operand.
    #[error("{output} and {other} are the same buffer; an output needs a buffer of its own")]
    Aliased {
        /// The output.
        output: &'static str,
        /// The other operand.
        other: &'static str,
    },
    /// A kernel that was asked for cannot run this problem on this device.
    #[error("kernel {kernel} cannot run here: {why}")]
    Kernel {
        /// The kernel.
        kernel: &'static str,
        /// The reason.
        why: Obstacle,
    },
    /// The device is below what any kernel of this crate needs.
    #[error("the device's {limit} is {got}{unit}; at least {want}{unit} is needed", unit = unit_of(limit))]
    Device {
        /// The wgpu limit.
        limit: &'static str,
        /// Its value.
        got: u64,
        /// What is needed.
        want: u64,
    },
    /// A file of weights cannot be read as safetensors.
    #[error("not a safetensors file: {0}")]
    File(String),
    /// A file of weights lacks a tensor.
    #[error("tensor {tensor:?} is missing")]
    MissingTensor {
        /// Its name.
        tensor: String,
    },
    /// A file of weights holds a tensor under the layer's prefix that the layer does not have.
    #[error("tensor {tensor:?} is not part of the layer")]
    ExtraTensor {
        /// Its name.
        tensor: String,
    },
    /// A tensor in a file has another shape than the layer needs.
    #[error("tensor {tensor:?} has shape {got:?}; it must be {want}")]
    TensorShape {
        /// Its name.
        tensor: String,
        /// Its shape.
        got: Vec<usize>,
        /// The shape needed.
        want: String,
    },
    /// A tensor in a file has a type that is not read.
    #[error("tensor {tensor:?} has type {got}; it must be F32, F16, BF16 or F64")]
    TensorType {
        /// Its name.
        tensor: String,
        /// Its type.
        got: String,
    },
    /// An environment variable that wgpu reads has a value that wgpu does not know and would ignore.
    #[error("the environment variable {variable} is {value:?}; it must be {want}, or not set")]
    Environment {
        /// Its name.
        variable: &'static str,
        /// Its value.
        value: String,
        /// The values that wgpu knows.
        want: &'static str,
    },
    /// No GPU adapter matches.
    #[error("no GPU adapter{wanted}; found: {found}")]
    NoAdapter {
        /// A phrase that names the adapter that was asked for; empty if none was.
        wanted: String,
        /// The adapters that exist.
        found: String,
    },
    /// More than one adapter matches the given name.
    #[error("adapter {wanted:?} is ambiguous; it matches {found}")]
    AmbiguousAdapter {
        /// What was asked for.
        wanted: String,
        /// The adapters that match.
        found: String,
    },
    /// The adapter refused to make a device.
    #[error("the adapter made no device: {0}")]
    RequestDevice(String),
    /// A shader or pipeline did not compile: a bug of this crate or of the driver.
    #[error("pipeline {variant} did not compile: {message}")]
    Pipeline {
        /// The kernel variant.
        variant: String,
        /// What the compiler said.
        message: String,
    },
    /// The device, or the host for results that it must hold, has no memory left.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The device was lost (driver reset, watchdog, removal, destroyed).
    #[error("the device is lost: {0}")]
    DeviceLost(String),
    /// wgpu refused a command.
    #[error("wgpu reported: {0}")]
    Validation(String),
    /// A buffer, an encoder or a prepared object belongs to another device than the one that it is used with.
    #[error("{field} belongs to another device")]
    OtherDevice {
        /// The operand, `encoder`, `prepared` or `resident`.
        field: &'static str,
    },
}

/// The unit of a limit of wgpu with a space before it: bytes, or nothing where the limit's name says what is counted.
fn unit_of(limit: &str) -> &'static str {
    let bytes = ["_buffer_size", "_binding_size", "_storage_size"].iter().any(|end| limit.ends_with(end));
    if bytes { " bytes" } else { "" }
}

/// What the caller can do where a tensor takes too many bytes.
fn advice(field: &str) -> &'static str {
    match field {
        "k" | "v" => "give a part of the keys in each call and join the results with Merge, or use a smaller batch",
        "mask" => {
            "a causal rule, a window or key lengths need no mask; else broadcast an axis, or give fewer rows in each call"
        }
        "bias" => "ALiBi needs no bias; else broadcast an axis, or give fewer rows in each call",
        "weights" | "logits" | "weights or logits" | "weights of heads" => {
            "do not ask for weights or logits, or give fewer rows or heads in each call"
        }
        "one row of scores" => {
            "raise Options::scratch_budget, or give a part of the keys in each call and join the results with Merge"
        }
        "cache" | "key cache" | "value cache" => {
            "use a smaller batch or less capacity, or a cache for each part of the batch"
        }
        "block_table" => "use a smaller batch, larger pages or fewer keys",
        "weight matrix" | "weight" => {
            "open the device with larger limits, use 16-bit weights, or divide the matrix by columns"
        }
        "rotary table" => "open the device with larger limits, or make the table for fewer positions",
        "partial_out" | "partial_lse" => "merge some of the partials first, or fewer rows in each call",
        _ => "use a smaller batch, or give fewer rows in each call",
    }
}

impl Error {
    /// The error for a tensor that takes too many bytes.
    pub(crate) fn bytes(field: &'static str, size: u64, limit: u64) -> Self {
        Error::Room { field, size, unit: "bytes", limit, advice: advice(field) }
    }

    /// The error for a tensor whose elements are farther apart than can be addressed.
    pub(crate) fn elements(field: &'static str, size: u64, limit: u64) -> Self {
        Error::Room { field, size, unit: "elements", limit, advice: "use smaller sizes or strides" }
    }
}

/// A number with its noun: one dispatch, or several of them.
pub(crate) fn counted(number: usize, noun: &str) -> String {
    let plural = match noun {
        _ if number == 1 => "",
        "dispatch" => "es",
        _ => "s",
    };
    format!("{number} {noun}{plural}")
}

impl From<wgpu::Error> for Error {
    fn from(error: wgpu::Error) -> Self {
        match error {
            wgpu::Error::OutOfMemory { source } => Error::OutOfMemory(source.to_string()),
            wgpu::Error::Validation { description, .. } => Error::Validation(description),
            wgpu::Error::Internal { description, .. } => Error::DeviceLost(description),
        }
    }
}
