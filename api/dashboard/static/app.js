// Routes: the part behind # names the page. Each page is a function (main, signal, ...arguments).

import { Problem, signedIn, signIn, signOut, get } from "./api.js";
import { h, toast } from "./ui.js";
import { jobsPage } from "./jobs.js";
import { jobPage } from "./job.js";
import { newPage } from "./new.js";
import { workersPage } from "./workers.js";

const main = document.getElementById("main");
const out = document.getElementById("sign-out");
let leaving = new AbortController();

const routes = [
  [/^#\/jobs$/, jobsPage],
  [/^#\/jobs\/([\w-]+)$/, jobPage],
  [/^#\/new$/, newPage],
  [/^#\/workers$/, workersPage],
];

function signInPage() {
  const key = h("input", { type: "password", id: "key", autocomplete: "off", required: true, placeholder: "tf_…" });
  const form = h("form", { class: "card", onsubmit: async (event) => {
    event.preventDefault();
    signIn(key.value);
    try {
      await get("/v1/jobs?limit=1");
      show();
    } catch (error) {
      signOut();
      toast(error.message);
      key.focus();
    }
  } },
  h("h1", {}, "Sign in"),
  h("p", { class: "muted" }, "With an API key. The first one is printed by the server at its first start; `tenfold-server key` makes another."),
  h("label", { for: "key" }, "API key"), key,
  h("p", {}, h("button", { type: "submit" }, "Sign in")));
  main.replaceChildren(form);
  key.focus();
}

async function show() {
  leaving.abort();
  leaving = new AbortController();
  out.hidden = !signedIn();
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash && location.hash.startsWith(link.hash)) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (!signedIn()) return signInPage();
  for (const [pattern, page] of routes) {
    const match = pattern.exec(location.hash);
    if (!match) continue;
    const { signal } = leaving;
    try {
      await page(main, signal, ...match.slice(1));
    } catch (error) {
      if (signal.aborted) return;
      leaving.abort(); // whatever else the page has under way
      if (error instanceof Problem && error.status === 401) { signOut(); toast(error.message); return signInPage(); }
      main.replaceChildren(h("div", { class: "notice bad", role: "alert" }, error.message));
    }
    return;
  }
  location.hash = "#/jobs";
}

out.addEventListener("click", () => { signOut(); show(); });
window.addEventListener("hashchange", show);
show();
