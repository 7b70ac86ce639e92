"""The shell: lexer, parser, interpreter, commands and the interactive prompt."""
