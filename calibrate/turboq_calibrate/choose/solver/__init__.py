"""Which candidate every (layer, KV head, K or V) takes under a byte budget: one integer program.

    minimise sum_u cost[u, c_u]    subject to sum_u size[u, c_u] <= budget  and  `Constraints`

`solve.allocate` is the entry; `problem` states it, `budget` reads what the user may ask for.
"""
