// Runs before the first paint, so that nobody who chose dark sees a flash of white. Not a module: those run later.
document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "auto";
