//! Checks that the host has the memory that a command needs, before the command allocates any of it. An allocation that fails ends
//! the program, and one that the system grants but cannot back ends it later.

use sysinfo::{ProcessRefreshKind, ProcessesToUpdate, System};
use wgpu_attention::Operand;
use wgpu_attention::internal::Kind;
use wgpu_attention::{Error, Plan, Result, Shape};

/// Bytes that the reference needs for each row beside its results: the row's indices, and the overhead of short vectors.
const ROW: u64 = 512;
/// Number of vectors, with one number per key, that the reference uses while it works on a row.
const VECTORS: u64 = 8;

/// Returns an error if `what` takes more bytes than the host has left.
pub fn room(what: impl std::fmt::Display, bytes: u64) -> Result<()> {
    let left = left();
    // The system may have a limit for this process that `left` does not know.
    let granted = || usize::try_from(bytes).is_ok_and(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok());
    if left.is_none_or(|left| bytes <= left) && granted() {
        return Ok(());
    }
    let limit = left.map_or("the system refuses them".into(), |left| format!("{left} bytes are left there"));
    Err(Error::OutOfMemory(format!("{what} takes about {bytes} bytes on the host; {limit}")))
}

/// Bytes that this process may still allocate, including swap; `None` if the system does not tell.
fn left() -> Option<u64> {
    let mut system = System::new().ok()?;
    system.refresh_memory();
    let machine = (system.total_memory() > 0).then(|| system.available_memory() + system.free_swap())?;
    let pid = sysinfo::get_current_pid().ok()?;
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), false, ProcessRefreshKind::nothing());
    let container = system.process(pid).and_then(|process| process.cgroup_limits());
    // Files in a container's page cache count as used, but are dropped when memory is needed. So the resident size is subtracted.
    Some(container.map_or(machine, |own| machine.min(own.total_memory.saturating_sub(own.rss) + own.free_swap)))
}

/// Bytes of the tensors that a call reads, and of its results. The small arrays do not count.
fn tensors(shape: &Shape) -> [u64; 2] {
    let dense = [shape.q(), shape.k(), shape.v()].map(|tensor| tensor.extent() * shape.problem().element.bytes());
    [
        dense.into_iter().sum::<u64>() + of_operands(shape),
        shape.out().extent() * shape.problem().element.bytes() + 4 * asked(shape),
    ]
}

/// The fewest bytes that a call moves through the device's memory: each operand is read once and each result is written once.
pub fn of_tensors(shape: &Shape) -> u64 {
    tensors(shape).into_iter().sum()
}

/// Bytes of the tensors beside q, k and v that a call reads.
pub fn of_operands(shape: &Shape) -> u64 {
    Operand::of_kind(Kind::Tensor).filter_map(|operand| operand.bytes(shape)).sum()
}

/// Elements of the results beside `out`.
fn asked(shape: &Shape) -> u64 {
    let matrices = u64::from(shape.problem().weights) + u64::from(shape.problem().logits.is_some());
    u64::from(shape.problem().lse) * shape.lse_len() + matrices * shape.scores_len()
}

/// Bytes that a call takes on the host beside its operands: copies on the way to the device and back and, on a CPU adapter, the
/// device's buffers.
pub fn of_call(plan: &Plan, cpu_adapter: bool) -> u64 {
    let [given, results] = tensors(plan.shape());
    let buffers = if cpu_adapter { given + results + plan.scratch_bytes() } else { 0 };
    2 * given + 3 * results + buffers
}

/// Bytes that the CPU reference takes beside the operands, in numbers of `size` bytes, with or without the error budget.
pub fn of_reference(shape: &Shape, size: u64, budget: bool) -> u64 {
    let results = shape.out().extent() + shape.lse_len() + asked(shape);
    // The results of each row, and the same results in the outputs.
    let copies = if budget { 4 } else { 3 };
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get() as u64);
    let heads = threads.min(u64::from(shape.problem().batch) * u64::from(shape.problem().kv_heads));
    // Keys and values of a head, and the magnitudes of the keys for the budget. One sequence may own all pages.
    let sequences = if shape.problem().paged.is_some() { 1 } else { shape.k().sizes[0].max(1) };
    let head =
        (2 * shape.k().extent() + shape.v().extent()) / (u64::from(sequences) * u64::from(shape.problem().kv_heads));
    let rows = threads * VECTORS * u64::from(shape.problem().seq_kv);
    size * (copies * results + heads * head + rows) + ROW * shape.lse_len()
}

#[cfg(test)]
mod tests {
    use wgpu_attention::Problem;

    use super::*;

    #[test]
    fn what_the_host_cannot_hold_is_refused_with_its_size_and_the_limit() {
        assert_eq!(room("nothing", 0), Ok(()));
        assert_eq!(room("little", 1 << 20), Ok(()));
        for bytes in [1 << 50, u64::MAX] {
            let error = room("the file", bytes).unwrap_err().to_string();
            let limit = error.strip_prefix(&format!("out of memory: the file takes about {bytes} bytes on the host; "));
            let limit = limit.and_then(|rest| rest.strip_suffix(" bytes are left there")).expect(&error);
            assert!((1..1 << 50).contains(&limit.parse::<u64>().unwrap()), "{error}");
        }
    }

    #[test]
    fn each_part_of_a_call_is_counted() {
        let small = Problem::new(1, 2, 64, 64, 16);
        let of = |problem: &Problem| of_reference(&problem.check().unwrap(), 8, true);
        let bytes = of(&small);
        let change = |change: fn(&mut Problem)| {
            let mut problem = small.clone();
            change(&mut problem);
            of(&problem) - bytes
        };
        // Sixty thousand scores in f64, with their budget.
        assert!(change(|p| p.weights = true) >= 2 * 8 * 2 * 64 * 64);
        assert!(change(|p| p.seq_q *= 1000) >= 512 * 2 * 63_936);
        assert!(change(|p| p.seq_kv *= 1000) >= 8 * 63_936 * 32);
    }
}
