"""The command line wg-interop: run, doctor, install, clean."""
