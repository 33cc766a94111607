"""Programs as users of other libraries write them, with the peer's class and, by one changed line, with ours."""
