"""Drop-ins for programs that use another library: change an import, keep the program."""
