"""Back-ends made of other packages: never chosen by default, reachable by `use_backend("flash_attn", ...)`.

None of them was run on a GPU by this project; stand-ins check which arguments they get.
"""
