"""The console: the aggregator as pages for people, at `/`.

Every page is HTML that the service writes; htmx fetches it again when something happens, and Pico gives it
its looks. Both lie in `vendor`, so nothing comes from another host and no script is ours.
Pages show what the operations say; buttons call the same operations, through the same admission and audit log
as the API.
"""
