"""How it is computed fast: one table of operations and their implementations; `plain` is always among them."""
