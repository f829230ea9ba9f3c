"""Lists of media on the net → files under a media root, with a ledger in which every row is accounted for.

config.py       what a user writes
sources.py      VATEX annotations, URL lists, category lists → rows (lists.py reads their files)
schedule.py     which download may begin when: limits per host, pauses
run.py          the flow: rows → attempts on Ray → ledger and results
results.py      clips table and summary
progress.py     the line that says how far a run is
worker.py       one Ray actor per node: attempts in threads
attempt.py      one attempt at one file: receive, check, put in place
receive.py      an http(s) URL → a partial file, resumed where the server allows it
page.py         a page that yt-dlp knows → a partial file (page_child.py: its process)
credentials.py  the user's own headers and cookies, and whom they are shown to
partial.py      partial files on disk
ledger.py       what became of each row, kept through crashes
"""
