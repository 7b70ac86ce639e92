"""Where the panels are and how they look, by the size of the terminal.

Narrow is below 80 columns, short below 24 lines, tiny below 13: see the breakpoints in `app`.
"""

CSS = """
Screen { layout: vertical; }
#header, #footer, #filter { height: 1; }
#filter { display: none; }
#filter.shown { display: block; }
#top { height: 10; }
#devices { width: 2fr; border: round $secondary; padding: 0 1; }
#throughput { width: 1fr; border: round $secondary; padding: 0 1; }
#processes { height: 1fr; border: round $primary; scrollbar-size-vertical: 1; overflow-x: hidden; }
#detail { height: 8; border: round $secondary; padding: 0 1; }
.-narrow #throughput { display: none; }
.-short #top { height: auto; }
.-short #devices { border: none; height: auto; }
.-short #throughput { display: none; }
.-short #processes { border: none; }
.-short #detail { height: 4; border: none; border-top: solid $secondary; }
.-tiny #top, .-tiny #detail { display: none; }
.-tiny #processes { border: none; }
ModalScreen { align: center middle; }
.dialog { width: 48; max-width: 100%; height: auto; max-height: 100%; border: round $accent; padding: 0 1; }
.dialog OptionList, .dialog Static { width: 100%; min-width: 1; text-wrap: nowrap; text-overflow: ellipsis; }
.dialog OptionList { height: 5; border: none; padding: 0; }
.dialog Static { height: auto; }
.dialog.wide { width: 78; }
.dialog.wide Static { text-wrap: wrap; text-overflow: fold; }
"""
