"""Many runs over chosen settings: each a process of its own, all of them resumable."""
