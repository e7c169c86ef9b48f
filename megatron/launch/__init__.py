"""What launchers say of a process, and are told of its end; free of torch."""
