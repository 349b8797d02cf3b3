//! Rounding of an output that was summed in f32.

use crate::contract::caps::Caps;
use crate::contract::error::Result;
use crate::contract::problem::Element;
use crate::contract::tensor::Tensor;
use crate::dispatch::part::Part;
use crate::dispatch::step::Bound;
use crate::dispatch::steps::{Steps, checked_u32};
use crate::kernel::params::Place;
use crate::kernel::slot::Slot;
use crate::kernel::uniform::Uniform;
use crate::kernel::{Variant, pack};

/// Rounds the f32 scratch of a dense output to its 16-bit type, in dispatches that each fit a binding. Of a packed batch, given by what
/// the parameters say of it and the bytes of its lists, only the tokens that a sequence owns: for the others the scratch holds an earlier call's results.
pub(crate) fn pack(
    caps: &Caps,
    element: Element,
    out: &Tensor,
    packed: Option<(pack::Params, u64)>,
    steps: &mut Steps<'_>,
) -> Result<()> {
    let variant = Variant::Pack(pack::Pack { element, packed: packed.is_some() });
    let total = out.extent();
    // From one token to the next; a single one may have any stride.
    let row = if out.sizes[2] > 1 { out.strides.row } else { total };
    // Whole alignment steps of the 16-bit side, so that both sides bind aligned and no word is shared.
    let step = (caps.binding() / 4).min(1 << 28) / caps.alignment() * caps.alignment();
    let [batch, heads, rows] = out.sizes;
    let part = Part::new(0..batch, 0..heads, 0..rows);
    let mut first = 0;
    while first < total {
        let elements = step.min(total - first);
        let words = elements.div_ceil(2);
        let col_tiles = checked_u32("words", words.div_ceil(variant.threads().into()))?;
        let mut params = pack::Params {
            place: Place { row_tiles: 1, col_tiles, heads: 1, ..Place::default() },
            elements: checked_u32("elements", elements)?,
            ..packed.map_or(pack::Params::default(), |(params, _)| params)
        };
        let mut bindings = vec![
            Bound { slot: Slot::Unpacked, offset: 4 * first, size: 4 * elements, written: false },
            Bound { slot: Slot::Out, offset: 2 * first, size: 4 * words, written: true },
        ];
        if let Some((of, lists)) = packed {
            params.element0 = checked_u32("elements between tokens", first % row)?;
            params.token_elements = checked_u32("elements between tokens", row)?;
            params.token0 = (first / row % u64::from(of.visible.total_q)) as u32;
            bindings.push(Bound { slot: Slot::Lists, offset: 0, size: lists, written: false });
        }
        steps.push(&part, variant, Uniform::new(&params), bindings, col_tiles, 32.0 * elements as f64)?;
        first += elements;
    }
    Ok(())
}
