"""One file per op: the public function with its contract and checks, its autograd, its raw ops."""
