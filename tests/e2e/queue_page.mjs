// What a person does with the queue page, in a browser that runs no script: prints what there was to see, as JSON.
import { createRequire } from "node:module";
import path from "node:path";

const [folder, base, key, batchId, job] = process.argv.slice(2);
const require = createRequire(path.join(folder, "queue_page.js"));
const { chromium } = require("playwright-core");

const PHONE = { width: 360, height: 740 };
const browser = await chromium.launch({
  executablePath: path.join(folder, "chromium"),
  args: ["--no-sandbox", "--disable-gpu"],
});
const queueUrl = `${base}/dashboard/queue`;
const credentials = { httpCredentials: { username: "anybody", password: key } };

// A page that keeps what the browser complains of, and all that it asks for.
async function open(options) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  const seen = { complaints: [], requests: [] };
  page.on("console", (message) => seen.complaints.push(message.text()));
  page.on("pageerror", (error) => seen.complaints.push(String(error)));
  page.on("request", (request) => seen.requests.push(`${request.method()} ${new URL(request.url()).pathname}`));
  return { page, seen, close: () => context.close() };
}

async function withoutKey() {
  const { page, close } = await open({ javaScriptEnabled: false });
  const answer = await page.goto(queueUrl);
  await close();
  return answer.status();
}

// A browser that would run scripts, and one attempt to see whether it says so when a page may not do something.
async function withScripts() {
  const { page, seen, close } = await open({ javaScriptEnabled: true, ...credentials });
  await page.goto(`${queueUrl}/batches/${batchId}?refresh=off`);
  const found = {
    complaints: [...seen.complaints],
    scripts: await page.evaluate(() => document.scripts.length),
    wasRun: await page.evaluate(() => "wasRun" in window),
    heading: await page.locator("h1").innerText(),
  };
  const refused = page.waitForEvent("console");
  await page.evaluate(() => document.body.setAttribute("style", "color: red"));
  found.refused = (await refused).text();
  await close();
  return found;
}

async function drawnAs(page, selector) {
  const box = await page.locator(selector).first().boundingBox();
  return { left: box.x, right: box.x + box.width, height: box.height };
}

// The way of somebody with a phone: the queue, the batch, its cancel, and back.
async function onPhone() {
  const { page, seen, close } = await open({
    javaScriptEnabled: false,
    viewport: PHONE,
    colorScheme: "dark",
    ...credentials,
  });
  const found = { status: (await page.goto(queueUrl)).status(), title: await page.title() };
  await page.waitForEvent("load");
  found.reloaded = page.url();
  await page.getByRole("link", { name: "Stop that" }).click();
  found.stopped = page.url();
  found.queue = await page.locator("main").innerText();
  found.table = await drawnAs(page, "table");
  for (const word of ["Cancel", "Retry"]) {
    await page.getByRole("button", { name: `${word} job ${job}`, exact: true }).click();
    found[word] = await page.locator(".badge").allTextContents();
  }
  await page.getByRole("link", { name: batchId }).click();
  found.graph = await drawnAs(page, "svg.graph");
  found.steps = await page.locator("svg g.step > text.name").allTextContents();
  found.states = await page.locator("svg g.step > text.state").allTextContents();
  found.aloud = await page.getByRole("img").getAttribute("aria-labelledby");
  found.paper = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  await page.getByRole("button", { name: "Cancel this batch" }).click();
  found.cancelled = { url: page.url(), buttons: await page.getByRole("button").count() };
  found.badge = await page.locator(".badge").first().innerText();
  await close();
  return { ...found, ...seen };
}

try {
  const found = { withoutKey: await withoutKey(), withScripts: await withScripts(), onPhone: await onPhone() };
  console.log(JSON.stringify(found));
} finally {
  await browser.close();
}
