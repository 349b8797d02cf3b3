{# The row with this number among those of `merge`, and its address `at`: in lse, in totals and, from first_lse on, in
   the lse of each partial. #}
    let rows = params.row_end - params.row0;
    let plane = number / rows;
    let row = params.row0 + number % rows;
    let head = params.head0 + plane % params.heads;
    let batch = params.batch0 + plane / params.heads;
    let at = batch * params.lse_batch + head * params.lse_head + row;
