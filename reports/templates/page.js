(() => {
  "use strict";
  const tip = document.getElementById("tip");
  const place = (x, y) => {
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - box.width - 6)) + "px";
    tip.style.top = (y - box.height - 10 < 4 ? y + 16 : y - box.height - 10) + "px";
  };
  const light = (g) => document.querySelectorAll("svg.chart").forEach((svg) => {
    const marks = g === null ? [] : svg.querySelectorAll('[data-g="' + g + '"]');
    svg.classList.toggle("dim", marks.length > 0);
    svg.querySelectorAll(".on").forEach((mark) => mark.classList.remove("on"));
    marks.forEach((mark) => mark.classList.add("on"));
  });
  // The native tooltips of SVG are slow; with a script they would show beside ours.
  document.querySelectorAll("svg.chart [data-tip] > title").forEach((title) => title.remove());
  let pinned = null;
  document.addEventListener("pointermove", (event) => {
    const mark = event.target.closest ? event.target.closest("[data-tip]") : null;
    if (mark && mark.dataset.tip) {
      tip.textContent = mark.dataset.tip;
      tip.style.display = "block";
      place(event.clientX, event.clientY);
    } else {
      tip.style.display = "none";
    }
    if (pinned === null) {
      const of = event.target.closest ? event.target.closest("[data-g]") : null;
      light(of && of.dataset.g !== "-1" ? of.dataset.g : null);
    }
  }, { passive: true });
  document.querySelectorAll(".legend button").forEach((button) => button.addEventListener("click", () => {
    pinned = pinned === button.dataset.g ? null : button.dataset.g;
    document.querySelectorAll(".legend button").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.g === pinned)));
    light(pinned);
  }));
  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.className = "sort";
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
        const order = (a, b) => {
          const [u, v] = [value(a), value(b)];
          if ((u === "") !== (v === "")) return u === "" ? 1 : -1;
          const found = u !== "" && v !== "" && !isNaN(u) && !isNaN(v) ? u - v : u.localeCompare(v);
          return down ? -found : found;
        };
        table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
      });
    });
  });
  const open = () => {
    const target = location.hash.length > 1 ? document.getElementById(location.hash.slice(1)) : null;
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", open);
  open();
})();
