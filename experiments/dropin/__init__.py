"""Programs of users of other libraries, run with the class of the library and with the one of this package."""
