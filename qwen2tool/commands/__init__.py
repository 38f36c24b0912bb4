"""One file a command: it parses, calls one function of a room, prints one result; everything heavy is lazy."""
