"""The service: the HTTP API and the page. Nothing here is imported before `searchengine serve` runs."""
