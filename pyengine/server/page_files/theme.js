// Light or dark before the first paint: what was chosen here, or else what the system prefers.
"use strict";
(() => {
  let chosen = "";
  try { chosen = localStorage.getItem("pyengine.theme") || ""; } catch { /* storage is closed to this page */ }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
