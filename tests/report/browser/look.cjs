"use strict";
// node look.cjs CHROMIUM REPORT [FOLDER]: opens a report as a reader would and prints what it saw as one JSON object;
// screenshots go into FOLDER. puppeteer-core and axe-core are found through NODE_PATH.
const path = require("node:path");
const puppeteer = require("puppeteer-core");
const axe = require.resolve("axe-core/axe.min.js");

const [chromium, report, folder] = process.argv.slice(2);
const address = `file://${path.resolve(report)}`;

async function opened(browser, {script = true, dark = false, width = 1280} = {}) {
  const page = await browser.newPage();
  const seen = {console: [], requests: []};
  page.on("console", (message) => { if (["error", "warn"].includes(message.type())) seen.console.push(message.text()); });
  page.on("pageerror", (error) => seen.console.push(String(error)));
  page.on("request", (request) => { if (!/^data:/.test(request.url())) seen.requests.push(request.url()); });
  await page.setViewport({width, height: 900});
  await page.setJavaScriptEnabled(script);
  await page.emulateMediaFeatures([{name: "prefers-color-scheme", value: dark ? "dark" : "light"}]);
  await page.goto(address, {waitUntil: "load"});
  return {page, seen};
}

const shoot = async (page, name, options = {}) => {
  if (folder) await page.screenshot({path: path.join(folder, `${name}.png`), ...options});
};

// Everything unfolded, so that nothing escapes the look at it.
const unfold = (page) => page.evaluate(() => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});

async function pictures(page) {
  return page.evaluate(async () => {
    const images = [...document.images];
    await Promise.all(images.map((image) => image.decode().catch(() => null)));
    return {count: images.length, broken: images.filter((image) => !image.complete || image.naturalWidth === 0).length,
            unnamed: images.filter((image) => !image.alt).length};
  });
}

async function faults(page) {
  await page.addScriptTag({path: axe}).catch(() => null);
  return page.evaluate(async () => {
    const {violations, passes} = await axe.run(document, {runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]});
    return {passes: passes.length, violations: violations.map((fault) =>
      `${fault.id}: ${fault.nodes.length} times, first ${fault.nodes[0].html} (${fault.nodes[0].failureSummary})`)};
  });
}

const scores = (page) => page.evaluate(() => [...document.querySelectorAll("#score-table td.score")].map((cell) => ({
  ...cell.dataset, shown: cell.innerText.trim().split(/\s+/)[0], interval: cell.querySelector(".interval").innerText})));

// A row of a table is named by its first cell.
const order = (page) => page.evaluate(() => [...document.querySelectorAll("#score-table tbody tr")].map((row) => row.cells[0].dataset.value));

async function keyboard(page) {
  const focused = () => page.evaluate(() => {
    const at = document.activeElement;
    return `${at.tagName.toLowerCase()}${at.id ? "#" + at.id : ""} ${(at.innerText || "").trim().slice(0, 30)}`;
  });
  await page.evaluate(() => { document.activeElement.blur(); window.scrollTo(0, 0); });
  const stops = [];
  for (let stop = 0; stop < 60; stop += 1) {
    await page.keyboard.press("Tab");
    stops.push(await focused());
  }
  const before = await order(page);
  await page.focus('#score-table th[data-sort="3"] button'); // the first score
  await page.keyboard.press("Enter");
  const after = await order(page);
  const sorted = await page.$eval('#score-table th[data-sort="3"]', (head) => head.getAttribute("aria-sort"));
  await page.focus("details.task summary");
  const wasOpen = await page.$eval("details.task", (details) => details.open);
  await page.keyboard.press("Enter");
  const isOpen = await page.$eval("details.task", (details) => details.open);
  return {stops, before, after, sorted, folds: wasOpen !== isOpen};
}

async function filtering(page) {
  await page.select("#filter-topic", "near");
  const near = await page.evaluate(() => [...document.querySelectorAll(".card:not([hidden])")].map((card) => card.dataset.topic));
  await page.select("#filter-topic", "");
  await page.type("#filter-text", "no such text in any of them");
  const none = await page.evaluate(() => document.querySelectorAll(".card:not([hidden])").length);
  const told = await page.$eval("#filter-count", (output) => output.value);
  await page.$eval("#filter-text", (input) => { input.value = ""; input.dispatchEvent(new Event("input")); });
  return {near, none, told};
}

async function main() {
  const browser = await puppeteer.launch({executablePath: chromium, args: ["--no-sandbox", "--disable-gpu"]});
  const found = {};
  try {
    for (const dark of [false, true]) {
      const name = dark ? "dark" : "light";
      const {page, seen} = await opened(browser, {dark});
      await shoot(page, name);
      if (!dark) {
        found.title = await page.title();
        found.scores = await scores(page);
        found.keyboard = await keyboard(page);
        found.filtering = await filtering(page);
        await page.reload({waitUntil: "load"});
      }
      await unfold(page);
      const held = await pictures(page);
      if (folder) {
        for (const id of ["scores", "kinds", "curves", "errors", "examples", "run", "times"]) {
          await page.$eval(`#${id}`, (section) => section.scrollIntoView());
          await shoot(page, `${name}-${id}`);
        }
      }
      // Under the page's own policy the examiner's script may not run; it is lifted in a second look only.
      const second = await opened(browser, {dark});
      await second.page.setBypassCSP(true);
      await second.page.reload({waitUntil: "load"});
      await unfold(second.page);
      found[name] = {...seen, pictures: held, axe: await faults(second.page),
                     unfolds: await page.evaluate(() => document.querySelectorAll("details:not([open])").length)};
      await second.page.close();
      await page.close();
    }
    const bare = await opened(browser, {script: false});
    await shoot(bare.page, "without-script");
    found.bare = {...bare.seen, scores: await scores(bare.page), pictures: await pictures(bare.page),
                  controls: await bare.page.$eval("#filter", (form) => form.offsetHeight)};
    const narrow = await opened(browser, {width: 390});
    await shoot(narrow.page, "narrow");
    found.narrow = await narrow.page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    if (folder) await narrow.page.pdf({path: path.join(folder, "report.pdf"), format: "A4", landscape: true, printBackground: false});
  } finally {
    await browser.close();
  }
  process.stdout.write(JSON.stringify(found));
}

main().catch((error) => { process.stderr.write(`${error.stack}\n`); process.exitCode = 1; });
