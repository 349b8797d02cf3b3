{# The start of a kernel whose workgroup owns TILE_Q query rows of one head. It finds these rows and the keys that they
   may see, and it ends workgroups that own no row. Needs visible.wgsl. #}
    let here = place(workgroup, grid);
    if (!here.inside) {
        return;
    }
    let batch = here.batch;
    let head = here.head;
    let seq = sequence(batch);
    let row_first = params.row0 + here.row_tile * TILE_Q;
    let row_end = min(params.row_end, seq.rows);
    if (row_first >= row_end) {
        return;
    }
    let row_last = row_end - 1u;
    let tile_last = min(row_first + TILE_Q - 1u, row_last);
    let range = tile_range(seq, row_first, tile_last);
