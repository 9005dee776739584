"""How reports look, and the script that sorts and searches their tables."""

#: Light and dark; on a phone only tables and plots scroll sideways, in boxes of their own.
PAGE_STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--line:#d8dde3;--ground:#fff;
--raised:#f6f8fa;--accent:#0b62a8}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa4af;--line:#353b43;
--ground:#15181c;--raised:#1e2329;--accent:#6cb6f5}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:72rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.7rem;margin:0 0 .3rem}h2{font-size:1.25rem;margin:2.2rem 0 .6rem}
h3{font-size:1rem;margin:1.4rem 0 .4rem;overflow-wrap:anywhere}
.lead{margin:0 0 1rem}.note{color:var(--soft);font-size:13px;max-width:46rem}
ul{padding-left:1.2rem}li{overflow-wrap:anywhere}
.wide{overflow:auto;max-height:34rem;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
td,th{padding:.3rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
tbody tr:last-child td{border-bottom:0}td small{color:var(--soft)}

th{position:sticky;top:0;z-index:1;background:var(--raised);font-weight:600;white-space:normal;
min-width:5.5rem;vertical-align:bottom;line-height:1.3}
.t{text-align:left}
td:first-child{position:sticky;left:0;background:var(--ground);max-width:45vw;overflow:hidden;
text-overflow:ellipsis}th:first-child{left:0;z-index:2}
th button{all:unset;cursor:pointer;display:block;width:100%}
th button:focus-visible,summary:focus-visible,.wide:focus-visible{outline:2px solid var(--accent)}
th[aria-sort]{color:var(--accent)}th[aria-sort=ascending] button::after{content:" ↑"}
th[aria-sort=descending] button::after{content:" ↓"}
details{margin:1rem 0}summary{cursor:pointer;font-weight:600;margin-bottom:.6rem}
input{font:inherit;padding:.35rem .6rem;border:1px solid var(--line);border-radius:6px;
background:var(--ground);color:var(--ink);width:min(20rem,100%)}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr));gap:1rem;
margin-top:1.2rem}
figure{margin:0;min-width:0}figcaption{color:var(--soft);font-size:13px}
.plots figure{border:1px solid var(--line);border-radius:6px;padding:.6rem .6rem 0}
.plots figcaption{color:var(--ink);font-weight:600}.plots div{max-height:30rem;overflow:auto}
svg{max-width:100%;height:auto;display:block}
.worst{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,260px),1fr));gap:1rem;
align-items:start}
img{max-width:100%;background:#000;border-radius:4px;display:block}
.key{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem}.key i{display:inline-block;width:.9rem;
height:.9rem;margin-right:.4rem;vertical-align:-.1rem;border-radius:2px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1rem}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}code{font-size:12px}
@media (max-width:480px){dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.6rem}
td,th{padding:.3rem .5rem}}
"""
#: Numbers sort by their values; what is not defined stays at the end either way.
TABLE_SCRIPT = """
for(const table of document.querySelectorAll('table.sortable')){
  const body=table.tBodies[0],heads=[...table.tHead.rows[0].cells];
  const value=(row,n)=>{const cell=row.cells[n],text=cell.dataset.v;
    return text===undefined?cell.textContent:text==='inf'?Infinity:parseFloat(text)};
  heads.forEach((head,n)=>head.firstChild.onclick=()=>{
    const up=head.getAttribute('aria-sort')!=='ascending';
    heads.forEach(one=>one.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort',up?'ascending':'descending');
    const rows=[...body.rows].map(row=>[value(row,n),row]);
    const none=one=>Number.isNaN(one)||one==='';
    const text=(a,b)=>String(a).localeCompare(b,'en',{numeric:true});
    const order=(a,b)=>typeof a==='number'?(a<b?-1:a>b?1:0):text(a,b);
    rows.sort(([a],[b])=>none(a)||none(b)?none(a)-none(b):(up?1:-1)*order(a,b));
    body.append(...rows.map(one=>one[1]))});
  const search=table.closest('details')?.querySelector('input');
  if(search)search.oninput=()=>{const word=search.value.toLowerCase();
    for(const row of body.rows)row.hidden=!(row.cells[0].textContent+' '+row.cells[1].textContent)
      .toLowerCase().includes(word)}}
"""
